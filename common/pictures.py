"""Pictures: figures that are saved, and attention as light on images."""

import textwrap
from functools import partial
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from common import checkpoints

LIGHT = "#3f5290", "#8a3080", "#ef5a3c", "#ffc53d"  # from what is not looked at to what is most
FRAME = "#4de8ff"
BLACK = 0.45  # how bright a black pixel is drawn, over a white one: its colour must show


def figure(rows=1, columns=1, width: float = 5.0, height: float = 3.2, title: str = "", **how):
    """A white figure, also in a dark notebook, and its axes."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        rows, columns, figsize=(width, height), facecolor="white", layout="constrained", **how
    )
    if title:
        text = textwrap.fill(title, round(13 * width), break_on_hyphens=False)
        fig.suptitle(text, x=0.01, ha="left", fontsize=10, parse_math=False)  # a file's $ is none
    return fig, axes


def save(fig, path: Path, dpi: int = 160) -> None:
    import matplotlib.pyplot as plt

    kind = path.suffix.removeprefix(".") or "png"
    checkpoints.save(partial(fig.savefig, dpi=dpi, format=kind), path)
    plt.close(fig)


def mean_look(p: Tensor, prefix: int, head: int | None = None, query: int | None = None):
    """Where the patches look on average: maps (B, H, N, N) to (B, N), of one head or of all.

    `prefix`: tokens before the patches. `query`: where this token looks.
    """
    p = p if head is None else p[:, head : head + 1]
    return (p[:, :, prefix:] if query is None else p[:, :, query : query + 1]).mean(dim=(1, 2))


def draw_overlays(images: Tensor, looks: dict[str, Tensor], prefix=1, rows=(), title="", marked=-1):
    """A row for each image, a column for each of `looks`: weights (B, N) as light on it.

    All share one scale: multiples of the share that each token would get of uniform attention, up
    to the largest, but for outliers. The `prefix` tokens before the patches are left out.
    `rows`: their names. `marked`: the number of a patch to frame (below 0: none).
    """
    pixels = rearrange(images, "b c h w -> b h w c").cpu()
    shares = {name: p[:, prefix:].detach().cpu() * p.shape[1] for name, p in looks.items()}
    values = torch.cat([p.flatten() for p in shares.values()])
    top, side = values.max().item(), isqrt(next(iter(shares.values())).shape[1])
    most = min(top, 1.1 * values.quantile(0.99).item())
    names, size = ("image", *looks), (2.2 + 1.1 * len(looks), 0.7 + 1.1 * len(pixels))
    fig, axes = figure(len(pixels), len(names), *size, title, squeeze=False)
    for image, line, *weights in zip(pixels, axes, *shares.values(), strict=True):
        line[0].imshow(image.expand(-1, -1, 3), extent=(0, image.shape[1], image.shape[0], 0))
        for axis, p in zip(line[1:], weights, strict=True):
            drawn = draw_overlay(axis, image.mean(-1), p.view(side, side), most)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            if marked >= 0:
                frame(axis, marked, side, image.shape[1])
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(textwrap.fill(name, 11, break_long_words=False), fontsize=9)
    for axis, name in zip(axes[:, 0], rows, strict=False):
        axis.set_ylabel(name, fontsize=9)
    ends = "max" if top > most else "neither"
    bar = fig.colorbar(drawn, ax=axes, shrink=0.8, aspect=6 * len(axes), extend=ends)
    bar.set_label("attention\n(1: uniform)", fontsize=9)
    return fig


def draw_overlay(axis, pixels, weights, most: float):
    """A gray image (H, W) in the light of weights (h, w), whose colour goes from 0 to `most`."""
    from matplotlib.colors import LinearSegmentedColormap

    whole = (0, pixels.shape[1], pixels.shape[0], 0)
    light = LinearSegmentedColormap.from_list("light", LIGHT)
    drawn = axis.imshow(weights, extent=whole, cmap=light, vmin=0, vmax=most)
    dense = (1 - BLACK) * (1 - np.asarray(pixels))  # black over the light, where the image is dark
    axis.imshow(np.zeros_like(dense), extent=whole, cmap="gray", vmin=0, vmax=1, alpha=dense)
    return drawn


def frame(axis, patch: int, side: int, pixels: int) -> None:
    """A frame around a patch of an image that is so many patches and pixels wide."""
    from matplotlib.patches import Rectangle

    size, (y, x) = pixels / side, divmod(patch, side)
    box = Rectangle((x * size, y * size), size, size, fill=False, clip_on=False, zorder=3)
    box.set(edgecolor=FRAME, linewidth=1.8)
    axis.add_patch(box)
