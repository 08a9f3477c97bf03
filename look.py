"""Where a ViT looks in a photograph: a picture, and its five likeliest classes.

    python look.py photo.jpg runs/distill-scenes-micro-s0/model.pt
    python look.py photo.jpg vit_base_patch16_224.mae --layers 0,6,11
    python look.py photo.jpg vit_small_patch14_dinov2.lvd142m --heads 0:3

A row for each head, first their mean; a column for each layer. The more orange
a patch, the more all patches look at it.
"""

import textwrap
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torchvision.transforms import v2

import data
from common import checkpoints, launch, pictures
from common.augment import Normalise, Normalization, to_pixels
from common.settings import Base, parse_layers, parse_settings, setting
from datasets.images import centre_crop, read_image
from teachers.load import Model, open_model


@dataclass(frozen=True)
class Settings(Base):
    photo: tuple[str, ...] = ()
    layers: str = setting("", "layers to draw: 0,6,11, -4: or all [four of them]")
    heads: str = setting("", "heads to draw, written the same way [their mean only]")
    image_size: int = setting(0, "pixels per side [the ViT's own]", high=4096)
    out: str = setting("", "the picture [runs/look-PHOTO.png]")
    device: str = setting("auto", "cpu, cuda, mps, or auto")


WORDS = "photo", "a photograph, then a ViT: photo.jpg model.pt", 2
parse = partial(parse_settings, __doc__, Settings, {}, positional=WORDS)


@torch.no_grad()
def look(photo: str, model: Model) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """The input (1, C, H, W), each layer's maps (1, H, N, N), and logits (classes,) or None."""
    config, kind = model.net.config, get_kind(model)
    square = centre_crop(config.image_size, kind.crop_pct)(read_image(photo))
    if config.channels == 1:
        square = v2.functional.rgb_to_grayscale(square)
    device = next(model.net.parameters()).device
    x = Normalise(kind.normalization, device)(square[None].to(device))
    maps = []
    for tokens, qk in model.blockwise(x):
        maps.append(qk.map())
    return x, maps, model.net.classify(tokens)[0] if config.classes else None


def get_kind(model: Model) -> data.DataSet:
    """The kind of images it was trained on, with its own normalisation if its file names one."""
    kind = data.DATA_SETS[model.checkpoint.settings.get("data", "imagenet")]
    return kind._replace(normalization=model.checkpoint.normalization or kind.normalization)


def draw(model: Model, x: Tensor, maps: list[Tensor], layers: list[int], heads: list[int]):
    """A matplotlib figure: a row for the mean of all heads and for each of `heads`."""
    prefix, rows = model.net.config.num_prefix_tokens, [None, *heads]
    looks = {
        f"layer {i}": torch.cat([mean_look(maps[i], prefix, head) for head in rows]) for i in layers
    }
    names = ["mean of heads", *(f"head {head}" for head in heads)]
    images = x.expand(len(rows), -1, -1, -1)
    return overlays(images, looks, get_kind(model).normalization, prefix, names)


def name_likeliest(logits: Tensor, classes: list[str] | None) -> dict[str, float]:
    """The five likeliest classes, in per cent."""
    names = classes or [f"class {i}" for i in range(len(logits))]
    p, best = logits.softmax(-1).topk(min(5, len(names)))
    return {names[i]: 100 * q for i, q in zip(best.tolist(), p.tolist(), strict=True)}


def main(settings: Settings) -> dict[str, float]:
    launch.one_process()
    photo, source = settings.photo
    out = Path(settings.out or f"runs/look-{Path(photo).stem}.png")
    checkpoints.check_place(out, "--out", ".png", ".pdf", ".svg")
    device = launch.get_device(settings.device)
    model = open_model(source, device, settings.image_size or None)
    depth, count = model.net.config.depth, model.net.config.heads
    layers = sorted({round(i * (depth - 1) / 3) for i in range(4)})
    layers = parse_layers(settings.layers, depth) if settings.layers else layers
    heads = parse_layers(settings.heads, count, "heads") if settings.heads else []
    x, maps, logits = look(photo, model)
    print(f"{photo} by {model.checkpoint}")
    likeliest = {} if logits is None else name_likeliest(logits, model.checkpoint.classes)
    for name, percent in likeliest.items():
        print(f"{percent:7.2f} %  {name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures.save(draw(model, x, maps, layers, heads), out)
    print(f"where it looks: {out}")
    return likeliest


# Maps over images --------------------------------------------------------------------------------


def mean_look(p: Tensor, prefix: int, head: int | None = None) -> Tensor:
    """Where the patches look on average: maps (B, H, N, N) to (B, N), of one head or of all.

    `prefix`: tokens before the patches.
    """
    p = p if head is None else p[:, head : head + 1]
    return p[:, :, prefix:].mean(dim=(1, 2))


def overlay(axis, pixels: Tensor, weights: Tensor, most: float):
    """Weights (h, w) in orange over a gray image (H, W); none of them is above `most`."""
    from matplotlib.colors import LinearSegmentedColormap

    ink = LinearSegmentedColormap.from_list("ink", [(1, 0.5, 0, 0), (1, 0.5, 0, 0.9)])
    whole = (0, pixels.shape[1], pixels.shape[0], 0)
    axis.imshow(pixels, extent=whole, cmap="gray", vmin=-0.6, vmax=1)  # black would hide the orange
    return axis.imshow(weights, extent=whole, cmap=ink, vmin=0, vmax=most)


def overlays(
    images: Tensor, looks: dict[str, Tensor], normalization: Normalization, prefix: int = 1, rows=()
):
    """A row for each image, a column for each of `looks`: weights (B, N) drawn over it.

    The more orange, the more a ViT looks there. All share one scale: multiples of the share that
    each token would get of uniform attention. The `prefix` tokens before the patches are left out.
    `rows`: their names.
    """
    pixels = rearrange(to_pixels(images, normalization), "b c h w -> b h w c").cpu()
    whole = (0, pixels.shape[2], pixels.shape[1], 0)
    shares = {name: p[:, prefix:].detach().cpu() * p.shape[1] for name, p in looks.items()}
    most = max(p.max() for p in shares.values()).item()
    fig, axes = pictures.figure(
        len(images), 1 + len(looks), 1.6 + len(looks), len(images) + 0.4, squeeze=False
    )
    for i, line in enumerate(axes):
        line[0].imshow(pixels[i].expand(-1, -1, 3), extent=whole)
        for axis, p in zip(line[1:], shares.values(), strict=True):
            side = isqrt(p.shape[1])
            drawn = overlay(axis, pixels[i].mean(-1), p[i].view(side, side), most)
        for axis in line:
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[0], ("image", *looks), strict=True):
        title = textwrap.fill(name, 9, break_long_words=False, break_on_hyphens=False)
        axis.set_title(title, fontsize=8)
    for axis, name in zip(axes[:, 0], rows, strict=False):
        axis.set_ylabel(name, fontsize=8)
    bar = fig.colorbar(drawn, ax=axes, shrink=0.8, aspect=30)
    bar.set_label("attention (1: uniform)", fontsize=8)
    return fig


if __name__ == "__main__":
    launch.run(main, parse)
