"""Images in, normalised batches on the device out: digits, CIFAR, ImageNet or any folder of images.

    --data digits      built in: translated cluttered digits, no download (digits.py)
    --data cifar10     downloaded to --data-dir, or image folders found there; also cifar100
    --data imagenet    --data-dir/train/CLASS/* and --data-dir/val/CLASS/*, or the official
                       archives there (which take scipy to unpack)
    --data folder      the same, or --data-dir/CLASS/*, for images of your own; without val/ a part
                       is held out; to pre-train they may lie in one folder, without labels

To add a data set: a row of KINDS; unless it is a folder of images, also a function that gives Parts
(such as from_cifar), called in `load`.

Every batch is a function of (seed, epoch, step): a run that is killed and resumed sees the same
images. The random numbers are drawn for the whole batch, over all GPUs, so crops and flips do not
depend on how many GPUs there are. What comes after them (the noise of erasing, mixing, drop path)
each process draws for its own share.
"""

from launch import counted, first_alone, print0, rank, world

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

import digits
import image_files
import image_folders
import subsets
from augment import Augment, Draws, Normalise, Normalization, reseed, seeded

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class Kind(NamedTuple):
    image_size: int
    channels: int
    normalization: Normalization
    crop_pct: float  # share of the image's side that evaluation sees
    recipe: int  # which default of a setting: 0 digits, 1 CIFAR, 2 ImageNet, 3 other folders
    advice: str = "point --data-dir at one that holds train/CLASS/* and val/CLASS/*, or CLASS/*"


KINDS = {
    "digits": Kind(digits.CANVAS, 1, ([0.25], [0.35]), 1.0, 0),
    "cifar10": Kind(32, 3, ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]), 1.0, 1),
    "cifar100": Kind(32, 3, ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]), 1.0, 1),
    "imagenet": Kind(
        224, 3, IMAGENET, 0.875, 2,
        advice="ImageNet-1K is available, free for research, from image-net.org: unpack it (or "
        "link it) so that images lie in train/CLASS/* and val/CLASS/* there, or point --data-dir "
        "at such a folder",
    ),
    "folder": Kind(96, 3, IMAGENET, 0.875, 3),
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """What a method needs to know of its images: `val` to choose by, `test` to report."""

    classes: list[str]
    channels: int
    image_size: int
    normalise: Normalise  # of all its images; a teacher's can be adopted
    train: "Train | None" = None
    val: "Eval | None" = None
    test: "Eval | None" = None  # the same as `val` if there is no third part (ImageNet's custom)
    held_out: int = 0  # how many training images stand in for test images, where there are none
    available: int = 0  # images to train on, before --num-labels takes some: a teacher sees all
    fingerprint: str = ""  # of these, if they are files
    test_fingerprint: str = ""  # of those to validate and to test on

    def described(self, labels: bool) -> str:
        """How many images there are, and of how many classes if `labels` matter."""
        said = f"{self.image_size} x {self.image_size}: {len(self.train):,} to train on"
        held = " held out" if self.held_out else ""
        if not labels:
            return said + (f", {len(self.val):,}{held}" if held else "")
        if self.val is self.test:
            said += f", {len(self.test):,}{held} to validate and test on"
        else:
            said += f", {len(self.val):,}{held} to validate on, {len(self.test):,} to test on"
        return f"{said}; {len(self.classes)} classes"

    @property
    def normalization(self) -> Normalization:
        return self.normalise.normalization

    def adopt(self, teacher) -> None:
        """Normalises the images as a teacher (a checkpoints.Checkpoint) was used to."""
        if teacher.normalization:
            if len(teacher.normalization[0]) != self.channels:
                raise ValueError(
                    f"{teacher.source} was trained on images of {len(teacher.normalization[0])} "
                    f"channels; these have {self.channels}: change --data or --teacher"
                )
            self.normalise.adopt(teacher.normalization)
        else:
            print0(f"note: {teacher.source} names no normalisation: the data set's is used")


class Parts(NamedTuple):
    """What a data set gives: images in three parts, and how those of the first are augmented."""

    classes: list[str]
    train: "Tensors | image_files.Files | None"
    val: "Tensors | image_files.Files | None"
    test: "Tensors | image_files.Files | None"  # None: a part of `train` is held out
    augment: Callable[[Tensor, Draws], Tensor] | None = None  # None: as the recipe has it


def load(settings, device, train: bool = True) -> Data:
    """The data set of the settings, to train on, or (with train=False) its test images only.

    Raises ValueError, or OSError for a missing folder, in words that say how to mend it.
    """
    kind, folder = KINDS[settings.data], image_folders.folder_of(settings)
    size = settings.image_size or kind.image_size
    normalise = Normalise(kind.normalization, device)
    if settings.data == "digits":
        parts = from_digits(settings, size, normalise, device)
    elif settings.data.startswith("cifar") and not (folder / "val").is_dir():
        parts = from_cifar(settings, size, device)
    else:
        parts = from_folders(settings, size, device, train)
    if len(parts.classes) < 2 and subsets.needs_labels(settings):
        raise ValueError(f"{folder} holds one class: put each in a folder of its own")
    source, val, test = parts.train, parts.val, parts.test
    if count := subsets.held_out(settings, parts, train):
        order = subsets.stratified(source.labels.cpu(), source.names)
        val, source = source.subset(order[:count]), source.subset(order[count:])
    test = test or val or source  # without any parts, all there is
    test_fingerprint = "".join(part.fingerprint for part in (val, test) if part)
    test_view = Eval(to_evaluate(test, device), normalise, device)
    val_view = test_view
    if val and val is not test:
        val_view = Eval(to_evaluate(val, device), normalise, device)
    view, available, fingerprint = None, 0, ""
    if train:
        source = source.readable()  # after the split, which does not depend on it
        available, fingerprint = len(source), source.fingerprint
        if settings.num_labels:
            source = subsets.labelled(source, settings)
        if missing := set(range(len(parts.classes))) - set(source.labels.tolist()):
            few = ", ".join(parts.classes[i] for i in sorted(missing)[:5])
            print0(f"note: no training images of {few}")
        source = to_train(source, device)
        in_files = isinstance(source, image_files.Files)
        augment = parts.augment or Augment(settings, normalise, cropped=in_files)
        view = Train(source, augment, settings, len(parts.classes), device)
    return Data(
        parts.classes, kind.channels, size, normalise, train=view, val=val_view, test=test_view,
        held_out=0 if parts.test else count, available=available, fingerprint=fingerprint,
        test_fingerprint=test_fingerprint,
    )  # fmt: skip


# Two views of a source: shuffled and augmented, or in order and as it is --------------------------


class Train:
    """Training images: shuffled, augmented, mixed; each process gets its share of every batch."""

    def __init__(self, source, augment: Callable, settings, classes: int, device):
        self.source, self.augment, self.device = source, augment, device
        self.rank, self.world, self.seed = rank(), world(), settings.seed
        self.batch = settings.batch or default_batch(len(source), self.world)
        if self.batch % self.world:
            raise ValueError(
                f"--batch {self.batch} does not divide by the {self.world} processes: choose a "
                "multiple"
            )
        if self.batch > len(source):
            raise ValueError(f"--batch {self.batch} is more than the {len(source)} training images")
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
            reseed(self.device, seed, epoch, step)  # for what torchvision draws by itself
            images = self.augment(images, draws)
            reseed(self.device, seed, epoch, step, self.rank)  # from here on each its own
            yield self.mix(images, labels) if self.mix else (images, labels)

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """So many images as the first epochs show them to all processes, unmixed; their labels."""
        whole, found, seen, epoch = copy.copy(self), [], 0, 0
        whole.rank, whole.world, whole.mix = 0, 1, None
        while seen < count:
            for some in whole.epoch(epoch):
                found.append(some)
                seen += len(some[0])
                if seen >= count:
                    break
            epoch += 1
        return tuple(torch.cat(parts)[:count] for parts in zip(*found, strict=True))


def default_batch(images: int, ranks: int) -> int:
    """The batch of --batch 0: an eighth of the images, but at most 64 (for each process alike)."""
    return max(1, min(64, images // 8) // ranks) * ranks


class Eval:
    """Images for evaluation."""

    def __init__(self, source, normalise: Normalise, device):
        self.source, self.normalise, self.device = source, normalise, device
        self.rank, self.world = rank(), world()
        if len(source) < self.world:
            raise ValueError(
                f"{len(source)} image(s) to evaluate on, for {self.world} process(es): start fewer"
            )

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

    def __init__(self, images: Tensor, labels: Tensor, names: Sequence = ()):
        self.images, self.labels = images, labels
        self.names, self.fingerprint = names or range(len(images)), ""

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: list[int]) -> "Tensors":
        return Tensors(self.images[indices], self.labels[indices])

    def readable(self) -> "Tensors":
        return self

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
    for name in ("crop_area", "randaugment", "random_erase"):
        if getattr(settings, name, 0):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag}: digits are augmented by placing them anew, and no other way")
    split = digits.Split(settings.scraps, normalise, device)
    train, *placed = split.whole("train"), split.placed("val"), split.placed("test")
    classes = [str(i) for i in range(10)]
    return Parts(classes, Tensors(*train), *(Tensors(*part) for part in placed), split.clutter)


def from_cifar(settings, size: int, device) -> Parts:
    if size != 32:
        raise ValueError(
            f"--image-size {size}: CIFAR images are 32 pixels a side "
            "(or point --data-dir at image folders)"
        )
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[settings.data]
    folder = image_folders.folder_of(settings)
    try:
        first_alone(lambda: kind(folder, download=True))
        sets = [kind(folder, train=part) for part in (True, False)]
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{settings.data} is neither in folder {folder} nor can it be downloaded "
            f"({error}): point --data-dir at folders train/CLASS/* and val/CLASS/*"
        ) from error
    sources = []
    for part in sets:
        images = rearrange(torch.from_numpy(part.data), "b h w c -> b c h w").contiguous()
        sources.append(Tensors(images.to(device), torch.tensor(part.targets, device=device)))
    return Parts(sets[0].classes, sources[0], None, sources[1])


def from_folders(settings, size: int, device, train: bool) -> Parts:
    kind, root = KINDS[settings.data], image_folders.folder_of(settings)
    if settings.data == "imagenet":
        first_alone(lambda: image_folders.unpack(root, train))
    found = image_folders.find(root, train or settings.holdout > 0, kind.advice)
    sources, pin = {}, device.type == "cuda"
    for name, part in found.items():
        sources[name] = image_files.Files(part.samples, size, kind, settings, pin)
    classes = next(iter(found.values())).classes
    return Parts(classes, sources.get("train"), None, sources.get("test"))


def to_train(source: "Tensors | image_files.Files", device) -> "Tensors | image_files.Files":
    """Images in files are decoded once, if they fit in memory, and cropped there.

    Squares of the very size as one tensor on the device, to be cropped a batch at a time.
    """
    if isinstance(source, Tensors) or not source.hold():
        return source
    if all(image.shape[1:] == (source.size, source.size) for image in source.held):
        return Tensors(torch.stack(source.held).to(device), source.labels.to(device))
    return source


def to_evaluate(source: "Tensors | image_files.Files", device) -> "Tensors | image_files.Files":
    """Images in files are decoded and cropped once, if they fit in memory."""
    source = source.readable()
    if isinstance(source, Tensors) or not source.may_fit():
        return source
    numbers = torch.arange(len(source)).split(256)
    batches = counted(source.batches(numbers), len(numbers), "batches decoded")
    images, labels = zip(*((x.to(device), y.to(device)) for x, y in batches), strict=True)
    return Tensors(torch.cat(images), torch.cat(labels), source.names)
