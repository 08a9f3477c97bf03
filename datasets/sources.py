"""What the other files here return: images and labels, in parts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.augment import hash_seed, seeded
from common.settings import format_flag, list_flags


def check_choices(settings) -> None:
    """ValueError for a setting that would silently have no effect on this data set."""
    for name, flag in list_flags(type(settings)).items():
        only = tuple(flag.metadata["only"].split())
        if only and name in settings.given and not settings.data.startswith(only):
            raise ValueError(f"{format_flag(name)}: only for --data {' or '.join(only)}")


class Parts(NamedTuple):  # images in three parts, and how those of the first are augmented
    classes: list[str]
    train: Any  # Tensors or images.Files
    val: Any = None
    test: Any = None
    augment: Callable | None = None  # None: as the recipe has it


def hold_out(parts: Parts, share: float) -> tuple:
    """Train, val and test: a share of the training images becomes val.

    The name of an image alone decides, so it stays where it is when others come or go.
    """
    if not share or not parts.train:
        return parts.train, parts.val, parts.test
    names = parts.train.names or range(len(parts.train))
    val = [i for i, name in enumerate(names) if hash_seed("holdout", name) / 2**56 < share]
    train = sorted({*range(len(names))} - {*val})
    if parts.val or not train or not val:
        raise ValueError(f"--holdout {share}: too few images ({len(names)}), or val/ exists: try 0")
    return parts.train.subset(train), parts.train.subset(val), parts.test


def draw_labels(source, count: int, seed: int):
    """`count` images (0: all), as many of each class: drawn in rounds."""
    if not count:
        return source
    if count > len(source):
        raise ValueError(f"--num-labels {count}: there are only {len(source)} images")
    labels = source.labels.cpu()
    order = torch.randperm(len(labels), generator=seeded("labels", seed))
    rounds = torch.empty_like(order)
    for label in labels.unique():
        of_class = labels[order] == label
        rounds[of_class] = torch.arange(of_class.sum())
    return source.subset(order[rounds.argsort(stable=True)][:count].tolist())


def hash_files(*sources) -> str:
    """A fingerprint of the names and contents of all image files. A bundled set has none."""
    known = [(x.names, x.contents.tolist()) for x in sources if x and x.contents is not None]
    return f"{hash_seed(*known):014x}" if known else ""


@dataclass(eq=False)
class Tensors:
    """Images held on the device, and their labels."""

    images: Tensor
    labels: Tensor
    names: Sequence = ()  # of the files they came from
    contents: Tensor | None = None  # hashes of all files: a scene shows several

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: list[int]) -> "Tensors":
        return Tensors(self.images[indices], self.labels[indices], contents=self.contents)

    def cache(self, centred: bool = False) -> "Tensors":
        return self

    def batches(self, order, key=None) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of each row of `order`. `key` is for files, which are cropped one by one."""
        for indices in order:
            indices = indices.to(self.images.device, non_blocking=self.images.is_cuda)  # see Files
            yield self.images[indices], self.labels[indices]
