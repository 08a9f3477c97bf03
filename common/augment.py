"""Augmentation of a whole batch at a time, on the device."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def hash_seed(*parts) -> int:
    """A seed of 56 bits, a function of all of `parts`. Nearby parts give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def seeded(*parts) -> torch.Generator:
    return torch.Generator().manual_seed(hash_seed(*parts))


def reseed(device: torch.device, *parts) -> None:
    """Seeds the global generators of the CPU and a device. torch.manual_seed is slower."""
    torch.default_generator.manual_seed(hash_seed(*parts))
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(hash_seed(*parts))


@dataclass
class BatchRandom:
    """The random numbers of one batch. Each process draws all, and takes those of its images."""

    generator: torch.Generator
    batch: int
    mine: slice
    device: torch.device

    def uniform(self, columns: int) -> Tensor:
        """The next numbers in 0..1: (images of this process, columns)."""
        numbers = torch.rand(self.batch, columns, generator=self.generator)[self.mine]
        return numbers.to(self.device, non_blocking=self.device.type == "cuda")  # see images.Files


def to_pixels(images: Tensor) -> Tensor:
    """Bytes to pixels in 0..1. Others are pixels already."""
    return images / 255 if images.dtype is torch.uint8 else images


class Augment:
    """Crop, flip, RandAugment and random erasing of pixels, as a recipe has them.

    `row`: has their mean and std. Gaps have the mean's colour, and erased boxes are noise of both.
    `cropped`: images.random_crop did the first three, one by one.
    """

    def __init__(self, settings, row, device, cropped: bool = False):
        self.settings, self.cropped = settings, cropped
        self.mean, self.std = torch.tensor([row.mean, row.std], device=device)[..., None, None]

    def __call__(self, images: Tensor, draws: BatchRandom) -> Tensor:
        own = self.settings
        if not self.cropped:  # zero padding is the mean's colour
            images = crop_and_flip(images - self.mean, draws, own.crop_area, own.flip) + self.mean
        if own.randaugment and not self.cropped:
            augment = rand_augment(own.randaugment, self.mean.flatten().tolist(), "bilinear")
            # One operation for 1/16 of the batch: a few kernels, not thousands.
            groups = images.clamp(0, 1).mul(255).round().byte().chunk(16)
            images = to_pixels(torch.cat([augment(group) for group in groups]))
        return random_erase(images, draws, own.random_erase, self.mean, self.std)


def rand_augment(magnitude: int, mean: Sequence[float], interpolation: str) -> Callable:
    """torchvision's RandAugment (Cubuk et al. 2020), on timm's scale. `mean`: colour of gaps."""
    from torchvision.transforms import InterpolationMode, v2  # slow to import

    how = dict(interpolation=InterpolationMode(interpolation), fill=[round(255 * x) for x in mean])
    operation = v2.RandAugment(1, 3 * magnitude, **how)  # timm counts to 10, torchvision to 30
    return v2.Compose(2 * [v2.RandomApply([operation], p=0.5)])


def build_mix(mixup: float, cutmix: float, classes: int) -> Callable:
    """MixUp, CutMix, or for each batch one of the two."""
    from torchvision.transforms import v2  # slow to import

    mixes = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
    mixes += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
    return v2.RandomChoice(mixes)


def crop_and_flip(images: Tensor, draws: BatchRandom, area: float, flip: float = 0.5) -> Tensor:
    """RandomResizedCrop of at least `area` of each square (0: a shift), and `flip` are flipped."""
    size = images.shape[-1]
    if area:
        left, top, w, h = crop_boxes(draws, area, size)
    else:
        reach = size // 8  # pixels
        left, top = ((draws.uniform(2) * (2 * reach + 1)).floor() - reach).unbind(1)
        w = h = torch.full_like(left, size)
    zero, sign = torch.zeros_like(w), torch.where(draws.uniform(1)[:, 0] < flip, -1.0, 1.0)
    columns = torch.stack([w / size * sign, zero, (2 * left + w) / size - 1], 1)
    rows = torch.stack([zero, h / size, (2 * top + h) / size - 1], 1)
    grid = F.affine_grid(torch.stack([columns, rows], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic" if area else "bilinear", align_corners=False)


def crop_boxes(draws: BatchRandom, area: float, size: int) -> tuple[Tensor, ...]:
    """Left, top, width and height (B,) of crops from squares, as torchvision draws them.

    The first of ten boxes of random area and aspect ratio that fits; the whole image if none does.
    """
    u = draws.uniform(20)
    share, ratio = area + (1 - area) * u[:, :10], torch.exp((2 * u[:, 10:] - 1) * math.log(4 / 3))
    w, h = ((x.sqrt() * size).round() for x in (share * ratio, share / ratio))
    fits = (torch.maximum(w, h) <= size) & (torch.minimum(w, h) > 0)
    first = fits.float().argmax(dim=1, keepdim=True)
    w, h = (torch.where(fits.any(1), x.gather(1, first)[:, 0], float(size)) for x in (w, h))
    return *(draws.uniform(2) * (size + 1 - torch.stack([w, h], 1))).floor().unbind(1), w, h


def random_erase(images: Tensor, draws: BatchRandom, probability: float, mean, std) -> Tensor:
    """Random erasing (Zhong et al. 2020): noise in a box of 2 % to 33 % of each image."""
    if not probability:
        return images
    u, size = draws.uniform(5), images.shape[-1]
    share, ratio = 0.02 + 0.31 * u[:, 1], torch.exp((2 * u[:, 2] - 1) * math.log(1 / 0.3))
    h, w = ((x.sqrt().clamp(max=1) * size) for x in (share * ratio, share / ratio))
    top, left = u[:, 3] * (size - h), u[:, 4] * (size - w)
    line = torch.arange(size, device=images.device) + 0.5
    rows = (line > top[:, None]) & (line < (top + h)[:, None])
    columns = (line > left[:, None]) & (line < (left + w)[:, None])
    box = (rows[:, :, None] & columns[:, None, :] & (u[:, :1, None] < probability))[:, None]
    return torch.where(box, mean + std * torch.randn_like(images), images)
