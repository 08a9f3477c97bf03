"""Whose maps a student gets: lenders, as a ViT is one."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import data
from vit import QK, ViT


@dataclass(frozen=True)
class FixedMaps:  # lends the same maps for every image
    maps: list[Tensor]  # of each block: (1, H, N, N)

    def lend(self, images: Tensor, layers, factors=None) -> Iterator[QK | None]:
        for i, p in enumerate(self.maps):
            yield QK.from_map(p.expand(len(images), -1, -1, -1)) if i in layers else None


@dataclass(frozen=True)
class OtherImages:  # lends maps of images in `bank`: at random, in evaluation always the same
    teacher: ViT
    bank: Tensor

    def lend(self, images: Tensor, layers, factors=None) -> Iterator[QK | None]:
        chosen = torch.arange(len(images)) % len(self.bank)
        if torch.is_grad_enabled():
            chosen = torch.randint(len(self.bank), (len(images),))
        return self.teacher.lend(self.bank[chosen], layers, factors)


@dataclass(frozen=True)
class Tokens:  # lends the tokens that enter a block, or that leave it, normalised
    teacher: ViT
    leaving: bool

    def lend(self, images: Tensor, layers, factors=None) -> Iterator[Tensor | None]:
        x = self.teacher.embed(images)
        for i, block in enumerate(self.teacher.blocks):
            before, (x, _) = x, block(x)
            tokens = x if self.leaving else before
            yield F.layer_norm(tokens, x.shape[-1:]) if i in layers else None


@torch.no_grad()
def average_maps(teacher: ViT, images: Tensor) -> list[Tensor]:
    """For each block the mean of its maps over images: (1, H, N, N)."""
    sums = [0.0] * len(teacher.blocks)
    for some in images.split(64):
        for i, (_, qk) in enumerate(teacher.blockwise(some)):
            sums[i] = sums[i] + qk.map().sum(dim=0, keepdim=True)
    return [total / len(images) for total in sums]


def make_uniform_map(teacher: ViT) -> Tensor:
    """Every query attends to all tokens equally: (1, H, N, N)."""
    tokens = teacher.config.num_prefix_tokens + teacher.config.grid_size**2
    shape, device = (1, teacher.config.heads, tokens, tokens), teacher.fc_norm.weight.device
    return torch.full(shape, 1 / tokens, device=device)


def make_centre_map(teacher: ViT) -> Tensor:
    """Every query attends to the patch in the centre: (1, H, N, N)."""
    p = torch.zeros_like(make_uniform_map(teacher))
    p[..., teacher.config.num_prefix_tokens + teacher.config.grid_size**2 // 2] = 1
    return p


def draw_impulse_map(teacher: ViT) -> Tensor:
    """Each head looks at one neighbour of a patch, in the same direction for all: (1, H, N, N),
    as a structured initialisation begins (arXiv 2505.19985), here without noise.
    """
    grid, first = teacher.config.grid_size, teacher.config.num_prefix_tokens
    p = 0.1 * make_uniform_map(teacher)
    p[:, :, :first] *= 10  # tokens that are no patches have no neighbours
    line, patches = torch.arange(grid), torch.arange(first, p.shape[-1])
    for head in range(teacher.config.heads):
        down, right = torch.randint(-1, 2, (2,)).tolist()
        rows, columns = ((line + step).clamp(0, grid - 1) for step in (down, right))
        p[:, head, patches, first + (rows[:, None] * grid + columns).flatten()] += 0.9
    return p


def choose_lender(teacher: ViT, dataset: data.Data, settings):
    if settings.how == "features" or settings.maps == "tokens":
        return Tokens(teacher, leaving=settings.how == "features")
    if settings.maps == "teacher":
        return teacher
    if settings.maps in ("other", "mean"):
        bank, _ = dataset.train.first(settings.bank)
        if settings.maps == "other":
            return OtherImages(teacher, bank)
        return FixedMaps(average_maps(teacher, bank))
    if settings.maps == "impulse":
        torch.manual_seed(settings.seed)
        return FixedMaps([draw_impulse_map(teacher) for _ in teacher.blocks])
    make_map = make_uniform_map if settings.maps == "uniform" else make_centre_map
    return FixedMaps([make_map(teacher)] * len(teacher.blocks))
