"""Where a ViT looks in a photograph: a picture, and its five likeliest classes.

    python look.py photo.jpg runs/distill-folder-mini-s0/model.pt
    python look.py photo.jpg vit_base_patch16_224.mae --layers 0,6,11
    python look.py photo.jpg vit_small_patch14_dinov2.lvd142m --heads 0:3
    python look.py photo.jpg vit_base_patch16_224.mae --query 7,7

The first row is the mean of all heads; --heads adds a row for each. A column is
a layer. Bright patches are looked at: by all patches on average, or by the one
that --query names.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import v2

import recipes
from common import checkpoints, launch, pictures, runs
from common.augment import to_pixels
from common.settings import Base, parse_layers, parse_settings, setting
from datasets.images import centre_crop, read_image
from teachers.load import Model, open_model
from vit import ViT


@dataclass(frozen=True)
class Settings(Base):
    photo: tuple[str, ...] = setting((), "a photograph and a ViT", low=2, high=2)
    layers: str = setting("", "layers to draw: 0,6,11, -4: or all [four of them]")
    heads: str = setting("", "heads to draw, such as 0:3 or all [their mean only]")
    query: str = setting("", "who looks: the patch ROW,COLUMN, from 0,0, or class [all patches]")
    image_size: int = setting(0, "pixels per side [the ViT's own]", high=4096)
    normalization: str = setting("", recipes.NORMALIZATION, ("", *recipes.NORMALIZATIONS))
    out: str = setting("", "the picture [runs/look-PHOTO-VIT.png]")
    device: str = setting("auto", "cpu, cuda, mps, or auto")


parse = partial(parse_settings, __doc__, Settings, {})


@torch.no_grad()
def look(photo: str, model: Model) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """The input (1, C, H, W), each layer's maps (1, H, N, N), and logits (classes,) or None."""
    config = model.net.config
    kind = recipes.DATA_SETS[model.checkpoint.settings.get("data", "imagenet")]
    square = centre_crop(config.image_size, kind.crop_pct)(read_image(photo))
    if config.channels == 1:
        square = v2.functional.rgb_to_grayscale(square)
    device = next(model.net.parameters()).device
    x = to_pixels(square[None].to(device))
    maps = []
    for tokens, qk in model.blockwise(x):
        maps.append(qk.map())
    classifies = config.classes and model.checkpoint.method != "pretrain"  # those name pixels
    return x, maps, model.net.classify(tokens)[0] if classifies else None


def find_query(name: str, net: ViT) -> int | None:
    """The token that --query names, or None for all patches."""
    row, _, column = name.partition(",")
    side, has_class = net.config.grid_size, net.cls_token is not None
    if not name or (name == "class" and has_class):
        return 0 if name else None
    if not (row.isdecimal() and column.isdecimal() and max(int(row), int(column)) < side):
        words = f"ROW,COLUMN, from 0,0 to {side - 1},{side - 1}{', or class' if has_class else ''}"
        raise ValueError(f"--query {name}: write {words}")
    return net.config.num_prefix_tokens + int(row) * side + int(column)


def draw(model: Model, x: Tensor, maps: list[Tensor], layers, heads, query: int | None, title: str):
    """A matplotlib figure: a row for the mean of all heads and for each of `heads`."""
    prefix, rows = model.net.config.num_prefix_tokens, [None, *heads]
    looks = {
        f"layer {i}": torch.cat([pictures.mean_look(maps[i], prefix, head, query) for head in rows])
        for i in layers
    }
    names = ["mean of heads", *(f"head {head}" for head in heads)]
    images, place = x.expand(len(rows), -1, -1, -1), -1 if query is None else query - prefix
    return pictures.draw_overlays(images, looks, prefix, names, title, marked=place)


def name_likeliest(logits: Tensor, classes: list[str] | None) -> dict[str, float]:
    """The five likeliest classes, in per cent. Failed if a logit is not finite."""
    runs.check_finite({"the sum of all logits": logits.sum()})
    names = classes or [f"class {i}" for i in range(len(logits))]
    p, best = logits.softmax(-1).topk(min(5, len(names)))
    return {names[i]: 100 * q for i, q in zip(best.tolist(), p.tolist(), strict=True)}


def main(settings: Settings) -> dict[str, float]:
    launch.require_one_process()
    photo, source = settings.photo
    if source.lower().endswith((".jpg", ".jpeg", ".png", ".webp")):
        raise ValueError(f"{source} is no ViT: name the photograph first")
    name = re.split(r"[/\\=]", source.removesuffix("/model.pt"))[-1]
    where = "-".join(Path(photo).with_suffix("").parts[-2:]).strip("/.-")  # folders may share names
    out = Path(settings.out or f"runs/look-{where}-{name}.png")
    checkpoints.check_place(out, "--out", ".png", ".pdf", ".svg")
    how = launch.get_device(settings.device), settings.image_size or None, settings.normalization
    model = open_model(source, *how)
    depth, count = model.net.config.depth, model.net.config.heads
    layers = sorted({round(i * (depth - 1) / 3) for i in range(4)})
    layers = parse_layers(settings.layers, depth) if settings.layers else layers
    heads = parse_layers(settings.heads, count, "heads") if settings.heads else []
    query = find_query(settings.query, model.net)
    x, maps, logits = look(photo, model)
    print(f"{photo} by {model.checkpoint}")
    likeliest = {} if logits is None else name_likeliest(logits, model.checkpoint.classes)
    for label, percent in likeliest.items():
        print(f"{percent:7.2f} %  {label}")
    out.parent.mkdir(parents=True, exist_ok=True)
    token = "the class token" if settings.query == "class" else f"the patch {settings.query}"
    looks = f"{token} looks" if settings.query else "all patches look"
    title = f"Where {looks} in {Path(photo).name}: {name}"
    pictures.save(draw(model, x, maps, layers, heads, query, title), out)
    print(f"where it looks: {out}")
    return likeliest


if __name__ == "__main__":
    launch.run(main, parse)
