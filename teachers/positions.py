"""Positions of patches: sin-cos and rope; and learned ones for another image size."""

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
    y, x = torch.meshgrid(*[torch.arange(grid_size, dtype=torch.float64)] * 2, indexing="ij")
    angles = [rearrange(axis, "h w -> (h w) 1") * rate for axis in (x, y)]
    waves = torch.cat([wave for a in angles for wave in (a.sin(), a.cos())], dim=1)
    return torch.cat([torch.zeros(1, dim), waves])[None].float()


def compute_rope_angles(grid_size: int, width: int, base: float) -> Tensor:
    """By how much rope turns each pair of a head's channels: (patches, width / 2).

    Half of the pairs turn with the row, half with the column, both in -1..1, with periods from 1 to
    nearly `base` (DINOv3, after Su et al. 2021).
    """
    line = (torch.arange(grid_size) + 0.5) / grid_size * 2 - 1
    spots = torch.cartesian_prod(line, line)
    periods = base ** (torch.arange(width // 4) / (width // 4))
    return rearrange(2 * math.pi * spots[:, :, None] / periods, "n two f -> n (two f)")


def rotate(x: Tensor, angles: Tensor, num_prefix_tokens: int) -> Tensor:
    """Turns the patches of queries or keys (B, H, N, d): channel i with channel i + d / 2."""
    first, (a, b) = x[:, :, :num_prefix_tokens], x[:, :, num_prefix_tokens:].chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([first, torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)], dim=2)


class Resize(NamedTuple):
    """How the code of a family resizes absolute positions."""

    antialias: bool = False
    offset: float = 0.0  # added to the number of patches per side, for the scale only
    mode: str = "bicubic"
    align_corners: bool = False


def resize(pos_embed: Tensor, grid_size: int, how: Resize | None) -> Tensor:
    """For another square grid: (1, g*g, D), or (1, 1 + g*g, D) with a class token."""
    how, old = how or Resize(), math.isqrt(pos_embed.shape[1])
    first, grid = pos_embed[:, : -(old**2)], pos_embed[:, -(old**2) :]
    if first.shape[1] > 1:
        raise ValueError(f"{pos_embed.shape[1]} position embeddings form no square grid of patches")
    if old == grid_size:
        return pos_embed
    grid, size = rearrange(grid, "one (h w) d -> one d h w", h=old).float(), (grid_size, grid_size)
    scale = dict(scale_factor=(grid_size + how.offset) / old) if how.offset else dict(size=size)
    options = dict(mode=how.mode, antialias=how.antialias, align_corners=how.align_corners)
    grid = rearrange(F.interpolate(grid, **scale, **options), "one d h w -> one (h w) d")
    return torch.cat([first, grid.to(first.dtype)], dim=1)
