"""Where tokens are: relative positions, rope, and how positions become those of another image size.

Absolute positions are a part of the tokens (vit.ViT.embed). The other two are a part of attention:
they change where a token looks, and so they belong to what is lent.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn


class Places(NamedTuple):
    """Where the patches are that a block is given."""

    angles: Tensor | None = None  # of rope: (patches, d / 2), or (B, 1, patches, d / 2)
    patches: Tensor | None = None  # which of them there are: (B, patches); None: all, in order


ALL = Places()


class RelativePositions(nn.Module):
    """A bias of the scores for each step from query to key, and for those of the class token.

    BEiT (Bao et al. 2022), after Swin (Liu et al. 2021).
    """

    def __init__(self, side: int, heads: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, heads))
        self.register_buffer("index", relative_index(side), persistent=False)

    def forward(self, places: Places = ALL) -> Tensor:
        """(1, H, N, N), or (B, H, N, N) where only some patches are there."""
        index = self.index[None]
        if places.patches is not None:
            tokens = F.pad(1 + places.patches, (1, 0))  # the class token is always
            index = self.index[tokens[:, :, None], tokens[:, None, :]]
        return rearrange(self.table[index], "b q k h -> b h q k")


def relative_index(side: int) -> Tensor:
    """The row of the table for each query and key, the class token first: (N, N).

    The last three rows are from the class token, to it, and from it to itself.
    """
    line = torch.arange(side)
    spots = torch.cartesian_prod(line, line)
    down, right = (spots[:, None] - spots + side - 1).unbind(-1)
    steps = 2 * side - 1
    index = torch.empty(1 + side**2, 1 + side**2, dtype=torch.long)
    index[1:, 1:] = down * steps + right
    index[0], index[:, 0], index[0, 0] = steps**2, steps**2 + 1, steps**2 + 2
    return index


def rope_angles(side: int, width: int, base: float) -> Tensor:
    """By how much rope turns each pair of the `width` channels of a head, at a patch: (N, d / 2).

    Half of the pairs turn with the row, half with the column, in -1..1; periods from 1 to nearly
    `base` (DINOv3, after Su et al. 2021).
    """
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    spots = torch.cartesian_prod(line, line)
    periods = base ** (torch.arange(width // 4) / (width // 4))
    return rearrange(2 * math.pi * spots[:, :, None] / periods, "n two f -> n (two f)")


def rotate(x: Tensor, angles: Tensor, prefix: int) -> Tensor:
    """Queries or keys (B, H, N, d), those of patches turned: channel i with channel i + d / 2."""
    first, patches = x[:, :, :prefix], x[:, :, prefix:]
    a, b = patches.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([first, torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)], dim=2)


# Another image size -------------------------------------------------------------------------------


class Resize(NamedTuple):
    """How the code of a family resizes absolute positions."""

    antialias: bool = False
    offset: float = 0.0  # added to the number of patches a side, for the scale only
    mode: str = "bicubic"
    align_corners: bool = False


PLAINLY = Resize()


def resized(pos_embed: Tensor, side: int, how: Resize = PLAINLY) -> Tensor:
    """Absolute positions (1, prefix + g*g, D) for another square grid of patches."""
    count = pos_embed.shape[1]
    old = int(count**0.5)  # a prefix, of the class token, is less than a row
    first, grid = pos_embed[:, : count - old**2], pos_embed[:, count - old**2 :]
    if first.shape[1] > 1:
        raise ValueError(f"{count} position embeddings form no square grid of patches")
    if old == side:
        return pos_embed
    grid = rearrange(grid, "one (h w) d -> one d h w", h=old).float()
    scale = dict(scale_factor=(side + how.offset) / old) if how.offset else dict(size=(side, side))
    how = dict(mode=how.mode, antialias=how.antialias, align_corners=how.align_corners)
    grid = F.interpolate(grid, **scale, **how)
    return torch.cat([first, rearrange(grid, "one d h w -> one (h w) d").to(first.dtype)], dim=1)


def resized_relative(table: Tensor, side: int) -> Tensor:
    """A table of relative positions ((2g - 1)^2 + 3, H) for another grid, linearly.

    As BEiT and timm: what is far away is known more coarsely, so that the old steps lie in the new
    grid at distances that grow geometrically. Between them linearly, as timm (BEiT's own code: by
    cubic splines).
    """
    steps, old = 2 * side - 1, round((len(table) - 3) ** 0.5)
    if old == steps:
        return table
    spots = geometric(old, steps)
    weigh = [np.interp(np.arange(steps) - side + 1, spots, unit) for unit in np.eye(old)]
    weigh = torch.tensor(np.stack(weigh, axis=1), dtype=torch.float32)  # (new, old)
    grid = rearrange(table[:-3], "(h w) heads -> h w heads", h=old).float()
    grid = einsum(weigh, weigh, grid, "i h, j w, h w heads -> i j heads")
    return torch.cat([rearrange(grid, "i j heads -> (i j) heads").to(table.dtype), table[-3:]])


def geometric(old: int, new: int) -> list[float]:
    """`old` places, as far apart as powers of a number, that reach as far as `new` steps do."""
    low, high, half = 1.01, 1.5, old // 2
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**half) / (1 - q) > new // 2 else (q, high)
    out = np.cumsum([q**i for i in range(half)]).tolist()
    return [-x for x in reversed(out)] + [0.0] + out
