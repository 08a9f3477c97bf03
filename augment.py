"""Augmentation of a whole batch at a time, on the device: crops, flips, erasing, normalisation."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2


def number(*parts) -> int:
    """A seed that is a function of all of `parts`: nearby parts give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def seeded(*parts) -> torch.Generator:
    return torch.Generator().manual_seed(number(*parts))


@dataclass
class Draws:
    """The random numbers of one batch, whatever the number of processes that share it.

    They are drawn for all of the batch; each process takes the rows of its own images.
    """

    generator: torch.Generator
    batch: int
    mine: slice
    device: torch.device

    def uniform(self, columns: int) -> Tensor:
        """The next numbers in 0..1: (images of this process, columns)."""
        numbers = torch.rand(self.batch, columns, generator=self.generator)
        return numbers[self.mine].to(self.device, non_blocking=True)


class Normalise:
    """Images as bytes, or as floats in 0..1, less the mean of a data set, over its deviation."""

    def __init__(self, normalization: tuple[list[float], list[float]], device):
        self.mean, self.std = (torch.tensor(x, device=device)[:, None, None] for x in normalization)

    def __call__(self, images: Tensor) -> Tensor:
        scale = 255.0 if images.dtype is torch.uint8 else 1.0
        return (images / scale - self.mean) / self.std


def to_pixels(images: Tensor, normalization: tuple[list[float], list[float]]) -> Tensor:
    """What was normalised as pixels again, for pictures: in 0..1."""
    mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in normalization)
    return (images * std + mean).clamp(0, 1)


class Augment:
    """RandAugment, crop, flip, normalisation and erasing, as the settings of a recipe have them.

    `cropped`: the first three were done already, where the images were decoded.
    """

    def __init__(self, settings, normalise: Normalise, cropped: bool = False):
        self.settings, self.normalise, self.cropped = settings, normalise, cropped
        self.randaugment = None
        if settings.randaugment and not cropped:
            self.randaugment = v2.RandAugment(2, settings.randaugment)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        if self.randaugment:  # one operation for 1/16 of the batch: a few kernels, not thousands
            images = torch.cat([self.randaugment(group) for group in images.chunk(16)])
        images = self.normalise(images)
        if not self.cropped:
            images = crop_and_flip(images, draws, self.settings.crop_area)
        return random_erase(images, draws, self.settings.random_erase)


def crop_and_flip(images: Tensor, draws: Draws, area: float) -> Tensor:
    """RandomResizedCrop of at least `area` of the image, and half the time a flip.

    With `area` 0 a shift by up to 1/8 of the side. One affine resampling, for each image its own.
    """
    u = draws.uniform(5)
    size = images.shape[-1]
    if area:
        share, ratio = area + (1 - area) * u[:, 0], torch.exp((2 * u[:, 1] - 1) * np.log(4 / 3))
        w, h = (share * ratio).sqrt().clamp(max=1), (share / ratio).sqrt().clamp(max=1)
        x, y = (1 - w) * (2 * u[:, 2] - 1), (1 - h) * (2 * u[:, 3] - 1)
    else:
        w = h = torch.ones_like(u[:, 0])
        reach = size // 8
        x, y = ((u[:, 2:4] * (2 * reach + 1)).floor() - reach).mul(2 / size).unbind(1)
    zero = torch.zeros_like(w)
    flip = torch.where(u[:, 4] < 0.5, -1.0, 1.0)
    rows = torch.stack([w * flip, zero, x], 1), torch.stack([zero, h, y], 1)
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic" if area else "bilinear", align_corners=False)


def random_erase(images: Tensor, draws: Draws, probability: float) -> Tensor:
    """Random erasing (Zhong et al. 2020): noise in a box of 2 % to 33 % of each image."""
    if not probability:
        return images
    u, size = draws.uniform(5), images.shape[-1]
    share, ratio = 0.02 + 0.31 * u[:, 1], torch.exp((2 * u[:, 2] - 1) * np.log(1 / 0.3))
    h, w = ((x.sqrt().clamp(max=1) * size) for x in (share * ratio, share / ratio))
    top, left = u[:, 3] * (size - h), u[:, 4] * (size - w)
    line = torch.arange(size, device=images.device) + 0.5
    rows = (line > top[:, None]) & (line < (top + h)[:, None])
    columns = (line > left[:, None]) & (line < (left + w)[:, None])
    box = (rows[:, :, None] & columns[:, None, :] & (u[:, :1, None] < probability))[:, None]
    return torch.where(box, torch.randn_like(images), images)
