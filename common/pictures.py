"""Pictures: the curves of a run, maps over images."""

import textwrap
from math import isqrt
from pathlib import Path

from einops import rearrange
from torch import Tensor

from common import checkpoints
from common.augment import Normalization, to_pixels
from common.progress import NOT_SHOWN


def figure(rows: int = 1, columns: int = 1, width: float = 5.0, height: float = 3.2, **how):
    """A white figure, also in a dark notebook, and its axes."""
    import matplotlib.pyplot as plt

    size = (width, height)
    return plt.subplots(rows, columns, figsize=size, facecolor="white", layout="constrained", **how)


def save(fig, path: Path, dpi: int = 160) -> None:
    import matplotlib.pyplot as plt

    kind = path.suffix.removeprefix(".") or "png"
    checkpoints.write(path, lambda file: fig.savefig(file, dpi=dpi, format=kind))
    plt.close(fig)


def curves(rows: list[dict]):
    """The log of a run: the terms of its loss, what else is watched, and validation accuracy."""
    losses = [name for name in rows[0] if name not in NOT_SHOWN]
    scores = [name for name in rows[-1] if name.startswith("val_")]
    panels = {"loss": losses} | ({"validation top-1 (%)": scores} if scores else {})
    fig, axes = figure(1, len(panels), width=4.5 * len(panels), squeeze=False)
    for axis, (label, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            known = [row for row in rows if name in row]
            marker = "o" if len(known) == 1 else None  # one epoch is no line
            epochs, values = [row["epoch"] for row in known], [row[name] for row in known]
            axis.plot(epochs, values, label=name.replace("_", " "), marker=marker)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if label == "loss" and len(names) > 1:  # of different sizes
            axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    return fig


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
    fig, axes = figure(
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
        how = dict(break_long_words=False, break_on_hyphens=False)
        axis.set_title(textwrap.fill(name, 9, **how), fontsize=8)
    for axis, name in zip(axes[:, 0], rows, strict=False):
        axis.set_ylabel(name, fontsize=8)
    bar = fig.colorbar(drawn, ax=axes, shrink=0.8, aspect=30)
    bar.set_label("attention (1: uniform)", fontsize=8)
    return fig
