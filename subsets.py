"""Which images are held out to validate on, and which have labels."""

from launch import print0

from collections.abc import Sequence

import torch
from torch import Tensor

from augment import number, seeded
from image_folders import folder_of


def needs_labels(settings) -> bool:
    """Pre-training does not: it has no setting that is about labels, as --smoothing is."""
    return hasattr(settings, "smoothing")


def held_out(settings, parts, train: bool) -> int:
    """How many training images (of a data.Parts) to validate on: --holdout, or a fifth if there is
    no val/."""
    count, images = settings.holdout, len(parts.train or ())
    if count < 0:
        count = 0 if parts.test else min(images // 5, 10_000)
    if count and (parts.val or count >= images):
        raise ValueError(
            f"--holdout {count}: hold out fewer images than there are for training ({images}); "
            "digits come with a validation part of their own"
        )
    if train and needs_labels(settings) and not count and not parts.test:
        raise ValueError(
            f"{folder_of(settings)} has no val/: --holdout some of its {images} images"
        )
    if not (count or train or parts.test):
        print0(f"no val/ in {folder_of(settings)}: all {images:,} images are evaluated")
    return count


def labelled(source, settings):
    """The --num-labels images of a source that are trained on."""
    if settings.num_labels > len(source):
        raise ValueError(
            f"--num-labels {settings.num_labels}: there are only {len(source)} training images"
        )
    seed = settings.seed if settings.subset_seed < 0 else settings.subset_seed
    drawn = class_by_class(source.labels.cpu(), settings.num_labels, seeded("labels", seed))
    return source.subset(drawn)


def stratified(labels: Tensor, names: Sequence) -> list[int]:
    """All images in an order by chance, of which any beginning holds each class by its share.

    The chance is a function of their names: an image more or less hardly changes the order.
    """
    chance = torch.tensor([number("holdout", name) for name in names]).double() / 2**56
    place = torch.empty(len(labels)).double()  # within its class, from 0 to 1
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        ranked = of_class[chance[of_class].argsort()]
        place[ranked] = (torch.arange(len(ranked)) + chance[ranked]) / len(ranked)
    return place.argsort(stable=True).tolist()


def class_by_class(labels: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """`count` random images, as many of each class as of any other, but for a rest of one.

    Drawn round by round, one of each class that has any left.
    """
    order = torch.randperm(len(labels), generator=generator)
    rounds = torch.empty_like(order)
    for label in labels.unique():
        of_class = labels[order] == label
        rounds[of_class] = torch.arange(of_class.sum())
    return order[rounds.argsort(stable=True)][:count].tolist()
