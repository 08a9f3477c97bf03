"""Integrated gradients as a hint: images show what made a teacher choose the class.

Hernandez, Chang and Nordling (arXiv 2506.14440). A pixel x contributes to a
net's output F on the way from a black image x0 (Sundararajan et al. 2017):

    IG = (x - x0) * mean over a in 0..1 of  d F(x0 + a (x - x0)) / d x

While a small student learns, some images (--overlay) are half image, half map
of the teacher. Its softened classes and attention transfer at one middle layer
(related/activations.py) may be added. For both the teacher sees the plain image.

    python -m related.integrated_gradients               trains a teacher first
    python -m related.integrated_gradients --overlay 0 --out runs/no   no maps
    python -m related.integrated_gradients --shuffle --out runs/others   others' maps

A map belongs to one fixed image. So the images of the first epochs (--bank) are
cropped and placed once, and then used in all epochs. Here F is the logit of the
true class. The authors' code (GitHub: nordlinglab,
ModelCompression-IntegratedGradients) takes gradients of all probabilities from
the mean colour, without (x - x0), to a random power between 1 and 2. A variant
lays them over normalised images (--raw). It crops and flips images, but not maps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import data
import train
from common import launch
from common.augment import BatchRandom
from common.settings import merge_recipes, parse_settings, setting
from datasets import sources
from related import activations
from related.wide_resnet import WideResNet


@dataclass(frozen=True)
class Settings(activations.Settings):
    method = "integrated_gradients"
    has_teacher = True
    overlay: float = setting(0.1, "probability that a map is laid over an image", high=1)
    bank: int = setting(1, "epochs whose images, as shown there, are learned from", low=1)
    path: int = setting(16, "points between black and the image for gradients", low=2)
    shuffle: bool = setting(False, "lay over the map of another image")
    raw: bool = setting(False, "maps are laid over normalised images as they are")


SHARED = dict(at_weight=0.0, temperature=2.5, mixup=0.0, cutmix=0.0)
RECIPES = merge_recipes(
    {name: recipe | SHARED for name, recipe in activations.RECIPES.items()},
    digits=dict(overlay=0.5, epochs=12, warmup=0.0833, eval_every=4, bank=5),  # five places
)
parse = partial(parse_settings, __doc__, Settings, RECIPES)


def integrate_gradients(
    net: Callable, images: Tensor, labels: Tensor, black: Tensor, points: int
) -> Tensor:
    """What each pixel contributed to the logit of `labels`: (B, C, H, W), by the trapezoidal rule.

    `black` broadcasts to an empty image. The sum over an image is F(image) - F(black), but for the
    rule's error.
    """
    total, step = torch.zeros_like(images), 1 / (points - 1)
    for i in range(points):
        x = (black + i * step * (images - black)).requires_grad_(True)
        chosen = net(x).gather(1, labels[:, None]).sum()
        weight = step / 2 if i in (0, points - 1) else step
        total += weight * torch.autograd.grad(chosen, x)[0]
    return (images - black) * total


def make_hint(gradients: Tensor) -> Tensor:
    """As a picture: (B, 1, H, W) from 0 to 1. The strongest place of each image is 1."""
    strength = gradients.abs().sum(dim=1, keepdim=True)
    return strength / strength.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)


def lay_over(images_maps: Tensor, draws: BatchRandom, overlay: float) -> Tensor:
    """Turns some images (B, 2 C, H, W) into half image, half map. Maps are the last C channels.

    In the output these are the plain images.
    """
    images, maps = images_maps.chunk(2, dim=1)
    drawn = draws.uniform(1)[:, :, None, None] < overlay
    mixed = torch.where(drawn, 0.5 * images + 0.5 * maps, images)
    return torch.cat([mixed, images], dim=1)


def loss(student: WideResNet, images, labels, teacher: WideResNet, settings: Settings):
    """That of related/activations.py, at the middle group. The student sees the maps laid over."""
    seen, images = images.chunk(2, dim=1)
    return activations.loss(student, images, labels, teacher, settings, seen, groups=(1,))


def task(settings: Settings, dataset: data.Data) -> train.Task:
    plain = activations.task(settings, dataset)
    teacher = plain.loss.keywords["teacher"]
    own_loss = partial(loss, teacher=teacher, settings=settings)
    return replace(plain, data=add_maps(dataset, teacher, settings), loss=own_loss)


def add_maps(dataset: data.Data, teacher: WideResNet, settings: Settings) -> data.Data:
    """The same data set. Its training images are those of the bank, each with its map."""
    bank, labels = dataset.train.first(settings.bank * len(dataset.train))
    black = torch.zeros(1, len(dataset.mean), 1, 1, device=bank.device)
    pieces = zip(bank.split(100), labels.split(100), strict=True)
    maps = torch.cat([
        make_hint(integrate_gradients(teacher, *piece, black, settings.path))
        for piece in pieces
    ])  # fmt: skip
    if settings.shuffle:
        maps = maps.roll(1, dims=0)  # the order of images is random already
    if settings.raw:  # undoes what the net does to its images
        maps = maps * teacher.std + teacher.mean
    both = torch.cat([bank, maps.expand_as(bank)], dim=1)
    both = sources.Tensors(both, labels, contents=dataset.train.source.contents)
    augment = partial(lay_over, overlay=settings.overlay)
    view = data.Train(both, augment, settings, len(dataset.classes), bank.device)
    return dataset._replace(train=view, mean=2 * dataset.mean, std=2 * dataset.std)


main = partial(activations.main, task=task)


if __name__ == "__main__":
    launch.run(main, parse)
