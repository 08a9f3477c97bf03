"""What the other files here return: images and labels, in parts."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from common.augment import hash_seed

CHOICES = {  # settings that only these files here have a use for
    "distractors": {"digits"}, "scene": {"scenes"}, "dial": {"scenes"}, "label": {"scenes"},
    "classes": {"digits", "scenes"},
}  # fmt: skip


def check_choices(settings, module: str) -> None:
    """ValueError for a setting that would silently have no effect."""
    changed = settings.given | ({"label"} if settings.label != "class" else set())
    for name in sorted(changed & CHOICES.keys()):
        if module not in CHOICES[name]:
            raise ValueError(f"--{name}: only for --data {' and '.join(sorted(CHOICES[name]))}")
    if "data_dir" in settings.given and settings.data in ("digits", "scenes"):
        raise ValueError(f"--data-dir: --data {settings.data} is bundled. Name --data folder, say")


class Parts(NamedTuple):
    """Images in three parts, and how those of the first are augmented."""

    classes: list[str]
    train: Any  # Tensors or images.Files
    val: Any = None
    test: Any = None
    augment: Callable | None = None  # None: as the recipe has it


def hold_out(parts: Parts, share: float) -> tuple:
    """Train, val and test: a share of the training images becomes val, each by its own name."""
    if not share or not parts.train:
        return parts.train, parts.val, parts.test
    held = [is_held_out(name, share) for name in parts.train.names]
    ours, theirs = ([i for i, out in enumerate(held) if out is which] for which in (False, True))
    if parts.val or not ours or not theirs:
        raise ValueError(f"--holdout {share}: {len(held)} images are too few, or some are held out")
    return parts.train.subset(ours), parts.train.subset(theirs), parts.test


def is_held_out(name, share: float) -> bool:
    """A function of the image's name alone: it stays what it is when others come or go."""
    return hash_seed("holdout", name) / 2**56 < share


class Tensors:
    """Images held on the device, and their labels. `files`: the images.Files they came from."""

    def __init__(self, images: Tensor, labels: Tensor, files=None):
        self.images, self.labels, self.files = images, labels, files
        self.names = range(len(images))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def hashes(self) -> Tensor | None:
        return self.files.hashes if self.files else None

    @property
    def contents(self) -> Tensor | None:
        return self.files.contents if self.files else None

    def subset(self, indices: list[int]) -> "Tensors":
        return Tensors(self.images[indices], self.labels[indices])

    def batches(self, order, key=None) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of each row of `order`. `key` is for files, which are cropped one by one."""
        for indices in order:
            indices = indices.to(self.images.device, non_blocking=True)  # the host does not wait
            yield self.images[indices], self.labels[indices]


def hold(source, device, centred: bool = False):
    """Decodes image files once, if they fit in memory. `centred`: as evaluation sees them."""
    if isinstance(source, Tensors) or (images := source.hold(centred)) is None:
        return source
    return Tensors(images.to(device), source.labels.to(device), source)
