"""The images of each data set, in parts: bundled, downloaded, or in folders of your own."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common.augment import Normalise
from common.launch import first_alone, print0
from common.settings import parse_layers

FOLDERS = "point --data-dir at a folder that holds train/CLASS/* and val/CLASS/*, or CLASS/*"


class Parts(NamedTuple):
    """Images in three parts, and how those of the first are augmented."""

    classes: list[str]
    train: Any  # Tensors or images.Files
    val: Any = None
    test: Any = None
    augment: Callable | None = None  # None: as the recipe has it


def load_parts(settings, kind, size: int, normalise: Normalise, device) -> Parts:
    """All images of a data set. `kind`: its row in data.DATA_SETS."""
    name, folder = settings.data, Path(settings.data_dir or f"data/{settings.data}")
    if name.startswith("scenes"):
        return load_scenes(settings, kind, size, normalise, device)
    if settings.label != "class":
        raise ValueError("--label cell: only --data scenes has cells")
    bundled = name == "digits"
    if name.startswith("cifar"):  # unless folders other than torchvision's own cifar-* are there
        bundled = all(x.name.startswith((".", "cifar-")) for x in folder.glob("*/"))
    if not bundled:
        return load_folders(folder, (size, kind.crop_pct, settings, normalise))
    if size != kind.image_size:
        raise ValueError(f"--image-size {size}: --data {name} has {kind.image_size}")
    if name == "digits":
        return load_digits(settings, normalise, device)
    return load_cifar(name, folder, device)


def hold_out(parts: Parts, share: float) -> tuple:
    """Train, val and test: a share of the training images becomes val, each by its own name."""
    if not share or not parts.train:
        return parts.train, parts.val, parts.test
    from datasets.folders import is_held_out

    held = [is_held_out(name, share) for name in parts.train.names]
    ours, theirs = ([i for i, out in enumerate(held) if out is which] for which in (False, True))
    if parts.val or not ours or not theirs:
        raise ValueError(f"--holdout {share}: the {len(held)} images are too few, or val/ is there")
    return parts.train.subset(ours), parts.train.subset(theirs), parts.test


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

    def subset(self, indices: list[int]) -> "Tensors":
        return Tensors(self.images[indices], self.labels[indices])

    def batches(self, order, key=None) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of each row of `order`. `key` is for files, which are cropped one by one."""
        for indices in order:
            indices = indices.to(self.images.device, non_blocking=True)  # the host does not wait
            yield self.images[indices], self.labels[indices]


def hold(source, device, centred: bool = False):
    """Decodes image files once, if they fit in memory. `centred`: as evaluation sees them."""
    images = None if isinstance(source, Tensors) else source.hold(centred)
    return (
        source if images is None else Tensors(images.to(device), source.labels.to(device), source)
    )


def load_digits(settings, normalise: Normalise, device) -> Parts:
    from datasets import digits

    digits.check_augmentation(settings)
    split = digits.Split(settings.distractors, normalise, device)
    kinds = parse_layers(settings.classes, 10, "classes")
    parts = split.whole("train"), split.placed("val"), split.placed("test")
    train, val, test = (Tensors(*digits.choose(*part, kinds)) for part in parts)
    return Parts([str(kind) for kind in kinds], train, val, test, split)


def load_scenes(settings, kind, size: int, normalise: Normalise, device) -> Parts:
    from datasets import digits, scenes

    digits.check_augmentation(settings)
    if settings.data == "scenes":
        names, split = list("0123456789"), digits.Split(0, normalise, device)
        pools = [split.whole(part) for part in ("train", "val", "test")]
    else:
        photos = replace(settings, data=settings.data.removeprefix("scenes-"), label="class")
        found = load_parts(photos, kind._replace(image_size=32), 32, normalise, device)
        held = [hold(source, device) for source in hold_out(found, 0.1)]
        names = found.classes
        pools = [(F.avg_pool2d(x.images / 255, 2), x.labels) for x in held]
    classes, drawn = scenes.draw_all(pools, names, settings, size)
    train, val, test = (Tensors(*part) for part in drawn)
    return Parts(classes, train, val, test, scenes.AddNoise(normalise))


def load_cifar(name: str, folder: Path, device) -> Parts:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    if not list(folder.glob("cifar-*")):
        print0(f"downloading {name} to {folder} (if it cannot be: {FOLDERS})")
    first_alone(lambda: kind(folder, download=True))
    sets = [kind(folder, train=part) for part in (True, False)]
    sources = []
    for part in sets:
        images = rearrange(torch.from_numpy(part.data), "b h w c -> b c h w").contiguous()
        sources.append(Tensors(images.to(device), torch.tensor(part.targets, device=device)))
    return Parts(sets[0].classes, sources[0], None, sources[1])


def load_folders(folder: Path, how: tuple) -> Parts:
    from datasets import folders, images

    listings, sources = folders.list_parts(folder, FOLDERS), {}
    for part, found in listings.items():
        sources[part] = images.Files(found.samples, folders.name_images(found), *how)
    train, val, test = (sources.get(part) for part in ("train", "val", "test"))
    return Parts(found.classes, train, val if test else None, test or val)
