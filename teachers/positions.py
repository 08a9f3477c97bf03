"""Positions of patches: MAE's sin-cos; and those of a file for another image size."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def make_sincos(grid_size: int, dim: int) -> Tensor:
    """MAE's fixed positions (1, 1 + grid_size^2, dim): waves of x, of y; 0: the class token."""
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width that divides by 4, not {dim}")
    rate = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    line = torch.arange(grid_size, dtype=torch.float64)
    angles = torch.cartesian_prod(line, line).flip(1)[:, :, None] * rate  # of x, then of y
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return torch.cat([torch.zeros(1, dim), waves])[None].float()


class Resize(NamedTuple):
    """How the code of a family resizes absolute positions."""

    antialias: bool = False
    offset: float = 0.0  # added to the number of patches per side, for the scale only
    mode: str = "bicubic"  # or bilinear, from corner to corner


def resize(pos_embed: Tensor, grid_size: int, how: Resize | None) -> Tensor:
    """For another square grid: (1, g*g, D), or (1, 1 + g*g, D) with a class token."""
    how, old = how or Resize(), math.isqrt(pos_embed.shape[1])
    first, grid = pos_embed[:, : -(old**2)], pos_embed[:, -(old**2) :]
    grid, size = rearrange(grid, "one (h w) d -> one d h w", h=old).float(), (grid_size, grid_size)
    scale = dict(scale_factor=(grid_size + how.offset) / old) if how.offset else dict(size=size)
    options = dict(mode=how.mode, antialias=how.antialias, align_corners=how.mode == "bilinear")
    grid = rearrange(F.interpolate(grid, **scale, **options), "one d h w -> one (h w) d")
    return torch.cat([first, grid.to(first.dtype)], dim=1)
