"""Images in, normalised batches on the device out: digits, CIFAR, ImageNet or any folder of images.

    --data digits      built in: translated cluttered digits, no download (digits.py)
    --data cifar10     downloaded to --data-dir, or image folders found there; also cifar100
    --data imagenet    --data-dir/train/CLASS/* and --data-dir/val/CLASS/*
    --data folder      the same, for images of your own

To add a data set: a row of KINDS; unless it is a folder of images, also a function that gives Parts
(such as from_cifar), called in `load`.

Every batch is a function of (seed, epoch, step): a run that is killed and resumed sees the same
images. The random numbers are drawn for the whole batch, over all GPUs, so crops and flips do not
depend on how many GPUs there are. What comes after them (the noise of erasing, mixing, drop path)
each process draws for its own share.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

import digits
import image_files
from augment import Augment, Draws, Normalise, number, seeded
from launch import rank, world

Normalization = tuple[list[float], list[float]]  # mean and deviation per channel, of pixels in 0..1
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class Kind(NamedTuple):
    image_size: int
    channels: int
    normalization: Normalization
    crop_pct: float  # share of the image's side that evaluation sees
    recipe: int  # which of the three defaults of a setting: 0 digits, 1 CIFAR, 2 ImageNet


KINDS = {
    "digits": Kind(digits.CANVAS, 1, ([0.25], [0.35]), 1.0, 0),
    "cifar10": Kind(32, 3, ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]), 1.0, 1),
    "cifar100": Kind(32, 3, ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]), 1.0, 1),
    "imagenet": Kind(224, 3, IMAGENET, 0.875, 2),
    "folder": Kind(224, 3, IMAGENET, 0.875, 2),
}


@dataclass(frozen=True)
class Data:
    """What a method needs to know of its images: `val` to choose by, `test` to report."""

    classes: list[str]
    channels: int
    image_size: int
    normalization: Normalization
    train: "Train | None"
    val: "Eval"
    test: "Eval"  # the same object as `val` where a data set has no third part (ImageNet's custom)

    def vit_shape(self, patch: int) -> dict[str, int]:
        """The arguments of a ViT that say what images and classes it is for."""
        sizes = dict(image_size=self.image_size, patch=patch)
        return sizes | dict(channels=self.channels, classes=len(self.classes))


class Parts(NamedTuple):
    """What a data set gives: images in three parts, and how those of the first are augmented."""

    classes: list[str]
    train: "Tensors | image_files.Files | None"
    val: "Tensors | image_files.Files | None"
    test: "Tensors | image_files.Files"
    augment: Callable[[Tensor, Draws], Tensor] | None


def load(settings, device, normalization: Normalization | None = None, train: bool = True) -> Data:
    """The data set of the settings, to train on, or (with train=False) its test images only.

    `normalization` overrides the data set's own. Raises ValueError, or OSError for a missing
    folder, in words that say how to mend it.
    """
    kind = KINDS[settings.data]
    size = settings.image_size or kind.image_size
    normalization = normalization or kind.normalization
    normalise = Normalise(normalization, device)
    if settings.data == "digits":
        parts = from_digits(settings, size, normalise, device)
    elif settings.data.startswith("cifar") and not (Path(settings.data_dir) / "val").is_dir():
        parts = from_cifar(settings, size, normalise, device, train)
    else:
        parts = from_folders(settings, size, normalise, device, train)
    test = Eval(parts.test, normalise, device)
    val = Eval(parts.val, normalise, device) if parts.val else test
    if not train:
        return Data(parts.classes, kind.channels, size, normalization, None, val, test)

    source = parts.train
    if settings.holdout:
        if parts.val or settings.holdout >= len(source):
            raise ValueError(
                f"--holdout {settings.holdout}: hold out fewer images than there are for training "
                f"({len(source)}); digits come with a validation part of their own"
            )
        order = torch.randperm(len(source), generator=seeded("holdout")).tolist()
        val = Eval(source.subset(order[: settings.holdout]), normalise, device)
        source = source.subset(order[settings.holdout :])
    if settings.num_labels:
        if settings.num_labels > len(source):
            raise ValueError(
                f"--num-labels {settings.num_labels}: there are only {len(source)} training images"
            )
        seed = settings.seed if settings.subset_seed < 0 else settings.subset_seed
        chosen = class_by_class(source.labels.cpu(), settings.num_labels, seeded("labels", seed))
        source = source.subset(chosen)
    view = Train(source, parts.augment, settings, len(parts.classes), device)
    return Data(parts.classes, kind.channels, size, normalization, view, val, test)


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


# Two views of a source: shuffled and augmented, or in order and as it is --------------------------


class Train:
    """Training images: shuffled, augmented, mixed; each process gets its share of every batch."""

    def __init__(self, source, augment: Callable, settings, classes: int, device):
        self.source, self.augment, self.device = source, augment, device
        self.seed, self.batch = settings.seed, settings.batch
        self.rank, self.world = rank(), world()
        mixes = []
        for mix, name in ((v2.MixUp, "mixup"), (v2.CutMix, "cutmix")):
            if alpha := getattr(settings, name, 0.0):  # pre-training, without labels, has no such
                mixes.append(mix(alpha=alpha, num_classes=classes))
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def __len__(self) -> int:
        return len(self.source)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from step `start` on: images, and labels (B,), or (B, classes) if mixed."""
        seed, batch = self.seed, self.batch
        steps, share = len(self) // batch, batch // self.world
        order = torch.randperm(len(self), generator=seeded(seed, epoch))[: steps * batch]
        mine = slice(self.rank * share, (self.rank + 1) * share)
        batches = self.source.batches(order.view(steps, batch)[start:, mine], (seed, epoch))
        for step, (images, labels) in enumerate(batches, start):
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            rows = slice(mine.start, mine.start + len(images))
            draws = Draws(seeded(seed, epoch, step), batch, rows, self.device)
            torch.manual_seed(number(seed, epoch, step))  # for what torchvision draws by itself
            images = self.augment(images, draws)
            torch.manual_seed(number(seed, epoch, step, self.rank))  # from here on each its own
            yield self.mix(images, labels) if self.mix else (images, labels)


class Eval:
    """Images for evaluation."""

    def __init__(self, source, normalise: Normalise, device):
        self.source, self.normalise, self.device = source, normalise, device
        self.rank, self.world = rank(), world()

    def __len__(self) -> int:
        return len(self.source)

    def in_order(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process' share of all images, in order, as they are: images, and labels (B,)."""
        order = torch.arange(self.rank, len(self), self.world).split(batch)
        for images, labels in self.source.batches(order):
            images = images.to(self.device, non_blocking=True)
            yield self.normalise(images), labels.to(self.device, non_blocking=True)


# Sources ------------------------------------------------------------------------------------------


class Tensors:
    """Images held on the device, and their labels. (Those in files are in image_files.py.)"""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: list[int]) -> "Tensors":
        return Tensors(self.images[indices], self.labels[indices])

    def batches(self, order, key=None) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of each row of `order`. `key` is for sources that crop while they decode."""
        for indices in order:
            indices = indices.to(self.images.device, non_blocking=True)  # the host does not wait
            yield self.images[indices], self.labels[indices]


def from_digits(settings, size: int, normalise: Normalise, device) -> Parts:
    if size != digits.CANVAS:
        raise ValueError(
            f"--image-size {size}: the canvas of --data digits has {digits.CANVAS} pixels a side"
        )
    images, labels = digits.read(device)
    order = torch.randperm(len(images), generator=seeded("digits"))
    test, val, rest = (part.to(device) for part in order.split([500, 300, 997]))
    # The scraps, also of validation and test, are cut from training digits.
    clutter = digits.Clutter(images[rest], settings.scraps, normalise)

    def placed(part: Tensor, name: str) -> Tensors:
        part = part.repeat(4)
        draws = Draws(seeded("digits", name), len(part), slice(None), device)
        return Tensors(clutter.place(images[part], draws), labels[part])

    classes = [str(i) for i in range(10)]
    train = Tensors(images[rest], labels[rest])
    return Parts(classes, train, placed(val, "val"), placed(test, "test"), clutter)


def from_cifar(settings, size: int, normalise: Normalise, device, train: bool) -> Parts:
    if size != 32:
        raise ValueError(
            f"--image-size {size}: CIFAR images are 32 pixels a side "
            "(or point --data-dir at image folders)"
        )
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[settings.data]
    try:
        if rank() == 0:
            kind(settings.data_dir, download=True)
        if dist.is_initialized():
            dist.barrier()  # the others wait until it is there
        sets = [kind(settings.data_dir, train=part) for part in (True, False)]
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{settings.data} is neither in folder {settings.data_dir} nor can it be downloaded "
            f"({error}): point --data-dir at folders train/CLASS/* and val/CLASS/*"
        ) from error
    sources = []
    for part in sets:
        images = rearrange(torch.from_numpy(part.data), "b h w c -> b c h w").contiguous()
        sources.append(Tensors(images.to(device), torch.tensor(part.targets, device=device)))
    augment = Augment(settings, normalise) if train else None
    return Parts(sets[0].classes, sources[0], None, sources[1], augment)


def from_folders(settings, size: int, normalise: Normalise, device, train: bool) -> Parts:
    """Folders of image files: held in memory if they are small, else decoded as they are needed."""
    found = image_files.find(Path(settings.data_dir), train)
    classes, count = found["test"].classes, sum(len(part) for part in found.values())
    in_memory = count * 3 * size * size <= settings.memory * 2**30
    sources, pin = {}, device.type == "cuda" and not in_memory
    for name, part in found.items():
        crop_pct = KINDS[settings.data].crop_pct
        if in_memory and name == "train":  # decoded once, as the whole square
            crop_pct = 1.0
        random_crop = image_files.random_crop(size, settings) if name == "train" else None
        centre_crop = image_files.centre_crop(size, crop_pct)
        sources[name] = image_files.Files(part.samples, centre_crop, random_crop, settings, pin)
        if in_memory:
            sources[name] = Tensors(*image_files.decode_all(sources[name], device))
    augment = Augment(settings, normalise, cropped=not in_memory) if train else None
    return Parts(classes, sources.get("train"), None, sources["test"], augment)
