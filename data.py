"""Images in, batches of pixels in 0..1 out: scenes, digits, CIFAR, ImageNet or a folder.

    --data scenes      bundled: digits in a grid; where to look differs (datasets/scenes.py)
    --data digits      bundled: a handwritten digit on a cluttered canvas (datasets/digits.py)
    --data cifar10     downloaded to --data-dir, or image folders found there; also cifar100
    --data imagenet    --data-dir/train/CLASS/* and --data-dir/val/CLASS/*
    --data folder      the same, or --data-dir/CLASS/*, for your own photographs

Every batch is a function of (seed, epoch, step, process): a resumed run sees the same images.
"""

import copy
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.augment import Augment, BatchRandom, build_mix, reseed, seeded, to_pixels
from common.launch import get_device, print0, rank, world
from datasets.sources import Tensors, check_choices, draw_labels, hash_files, hold_out
from recipes import DATA_SETS, Images, Settings


class Data(NamedTuple):
    """What a method needs to know of its images: `val` to choose by, `test` to report."""

    classes: list[str]
    image_size: int
    mean: tuple[float, ...]  # of the pixels, for each channel
    std: tuple[float, ...]
    train: Any = None  # Train
    val: Any = None  # Eval
    test: Any = None  # the same as `val` if there is no third part, as usual on ImageNet
    holdout: float = 0.0  # share of the training images that was held out
    available: int = 0  # images to train on, before --num-labels takes some
    fingerprint: str = ""  # of all image files; a bundled set has none

    def check_classes(self) -> None:
        """ValueError if there is one class, or one without training images."""
        if len(self.classes) < 2:
            raise ValueError("the images are of one class: each needs a folder (scenes: --classes)")
        labels = () if self.train is None else self.train.source.labels.tolist()
        if labels and (absent := {*range(len(self.classes))} - {*labels}):
            few = f"{len(absent)} of {len(self.classes)} classes ({self.classes[min(absent)]})"
            raise ValueError(f"{few} have no image to train on: add some, or raise --num-labels")

    def count_learned(self, hashes: Tensor | None, part: str = "test") -> int:
        """How many images of a part are among those that a checkpoint learned from."""
        if hashes is None or (own := getattr(self, part).source).contents is None:
            return 0
        return int(torch.isin(own.contents, hashes).sum())

    def describe_repeats(self, part: str = "test", learned: Tensor | None = None) -> str:
        """Words if images of a part are also trained on, under whatever name (or in `learned`)."""
        seen = self.count_learned(self.train.source.contents if learned is None else learned, part)
        return f" ({seen:,} of these {len(getattr(self, part)):,} TRAINED ON)" if seen else ""

    def describe(self, labels: bool) -> str:
        """How many images there are, and of how many classes if `labels` matter."""
        text = f"{self.image_size} x {self.image_size}: {len(self.train):,} to train on"
        if not labels:
            return text
        purposes = {"val": "validate", "test": "test"}
        if self.val is self.test:
            purposes = {"test": "validate and test"}
        for part, purpose in purposes.items():
            text += f", {len(getattr(self, part)):,} to {purpose} on{self.describe_repeats(part)}"
        absent = len(self.classes) - len(self.test.source.labels.unique())
        few = f", {absent} of them without a test image" if absent else ""
        names = f" ({', '.join(self.classes)})" if len(self.classes) <= 10 else ""
        return f"{text}; {len(self.classes)} classes{names}{few}"


def load(settings: Images, train: bool = True) -> Data:
    """The data set of the settings. With train=False its validation and test images only."""
    row, device = DATA_SETS[settings.data], get_device(settings.device)
    size, place = settings.image_size or row.image_size, (rank(), world())
    check_choices(settings)
    module = importlib.import_module(f"datasets.{row.module}")
    parts = module.load(settings, row, size, device, train)
    if train and not parts.train:
        raise ValueError(f"{settings.data_dir or settings.data} has no train/")
    share = settings.holdout
    if share < 0:
        share = 0.0 if parts.test else 0.2
    source, val, test = hold_out(parts, share)
    test = test or val or source
    test_view = val_view = Eval(test.cache(centred=True), *place)
    if val not in (None, test):
        val_view = Eval(val.cache(centred=True), *place)
    found = Data(parts.classes, size, row.mean, row.std, None, val_view, test_view, share)
    if not train:
        return found
    assert isinstance(settings, Settings)
    if test is source:
        print0("note: nothing is held out: accuracies will be those of training images")
    seed = settings.seed if settings.subset_seed < 0 else settings.subset_seed
    drawn = draw_labels(source, settings.num_labels, seed).cache()
    cropped = not isinstance(drawn, Tensors)  # files are, as they are decoded
    augment = parts.augment or Augment(settings, row, device, cropped)
    view = Train(drawn, augment, settings, len(parts.classes), device)
    known = hash_files(source, val, test)
    return found._replace(train=view, available=len(source), fingerprint=known)


class Train:
    """Training images: shuffled, augmented, mixed; each process gets its share of every batch."""

    def __init__(self, source, augment: Callable, settings: Settings, classes: int, device):
        self.source, self.augment, self.device = source, augment, device
        self.rank, self.world, self.seed = rank(), world(), settings.seed
        usual = min(64, len(source) // 8)
        self.batch = settings.batch or max(1, usual // self.world) * self.world
        if self.batch % self.world or self.batch > len(source):
            most = f"at most the {len(source)} training images"
            raise ValueError(f"--batch {self.batch}: {most}, in multiples of {self.world}")
        self.steps = len(source) // self.batch  # of an epoch: full batches only
        mixes = settings.mixup, settings.cutmix
        self.mix = build_mix(*mixes, classes) if any(mixes) else None

    def __len__(self) -> int:
        return len(self.source)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from step `start` on: images, and labels (B,), or (B, classes) if mixed."""
        seed, batch, steps, share = self.seed, self.batch, self.steps, self.batch // self.world
        order = torch.randperm(len(self), generator=seeded(seed, epoch))[: steps * batch]
        mine = slice(self.rank * share, (self.rank + 1) * share)
        batches = self.source.batches(order.view(steps, batch)[start:, mine], (seed, epoch))
        for step, (images, labels) in enumerate(batches, start):
            draws = BatchRandom(seeded(seed, epoch, step), batch, mine, self.device)
            reseed(self.device, seed, epoch, step, self.rank)  # for what PyTorch draws by itself
            images = self.augment(to_pixels(images), draws)
            yield self.mix(images, labels) if self.mix else (images, labels)

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """The first images that training shows, over all processes, unmixed; and their labels."""
        whole = copy.copy(self)
        whole.rank, whole.world, whole.mix = 0, 1, None
        batches = itertools.chain.from_iterable(map(whole.epoch, itertools.count()))
        found = itertools.islice(batches, math.ceil(count / self.batch))
        images, labels = (torch.cat(parts)[:count] for parts in zip(*found, strict=True))
        return images, labels


@dataclass
class Eval:
    """Images for evaluation."""

    source: Any
    rank: int
    world: int

    def __len__(self) -> int:
        return len(self.source)

    def in_order(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process' share of all images, in order, as they are: images, and labels (B,)."""
        order = torch.arange(len(self))[self.rank :: self.world]
        for images, labels in self.source.batches(order.split(batch) if len(order) else ()):
            yield to_pixels(images), labels
