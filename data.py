"""Images in, normalised batches on the device out: built-in digits, CIFAR, ImageNet or any folder of images.

    --data digits      built in: translated cluttered digits, no download
    --data cifar10     downloaded by torchvision to --data-dir, or image folders found there; also cifar100
    --data imagenet    --data-dir/train/CLASS/* and --data-dir/val/CLASS/*
    --data folder      the same, for images of your own

Every batch is a function of (seed, epoch, step): a run that is killed and resumed sees the same images. The random numbers
are drawn for the whole batch, over all GPUs, so crops and flips do not depend on how many GPUs there are. What comes after
them (the noise of erasing, mixing, drop path) each process draws for its own share.

The digits are the 1,797 8x8 images of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits" (test part),
UCI Machine Learning Repository, 1998, CC BY 4.0, https://doi.org/10.24432/C50P49, as scikit-learn ships them.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, io
from torchvision.transforms import InterpolationMode, v2

FLAGS = {  # name: default, help
    "data": ("digits", "digits, cifar10, cifar100, imagenet or folder"),
    "data_dir": ("data", "where the images are, or go"),
    "image_size": (0, "side of the images in pixels (0: 12 digits, 32 cifar, 224 others)"),
    "subset_seed": (-1, "draws the subset of --labels instead of --seed (-1: --seed does)"),
    "holdout": (0, "validate on so many training images, held out, instead of on the test images"),
    "workers": (8, "processes that decode images, per GPU (at most one per CPU core)"),
    "memory": (2.0, "hold a folder in memory if it has at most so many GB when decoded"),
    "skip_unreadable": (False, "skip images that cannot be read, and count them"),
}
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
KINDS = {  # image size, channels, (mean, std), share of the image's side that evaluation sees
    "digits": (12, 1, ([0.25], [0.35]), 1.0),
    "cifar10": (32, 3, ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]), 1.0),
    "cifar100": (32, 3, ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]), 1.0),
    "imagenet": (224, 3, IMAGENET, 0.875),
    "folder": (224, 3, IMAGENET, 0.875),
}


@dataclass
class Data:
    """What a method needs to know of its images. `val` is for looking and choosing, `test` for the reported number."""

    classes: list[str]
    channels: int
    image_size: int
    normalization: tuple[list[float], list[float]]  # mean and std per channel, of pixels in 0..1
    train: "Part | None"
    val: "Part"
    test: "Part"  # the same object as `val` where a data set has no third part (ImageNet's custom)


def load(args, device, normalization=None, train: bool = True) -> Data:
    """The data set that `args` name (FLAGS and the augmentations of a recipe). `normalization` overrides its own.

    Raises ValueError, or OSError for a missing folder, in words that say how to mend it.
    """
    if args.data not in KINDS:
        raise ValueError(f"--data {args.data} is not known: choose one of {', '.join(KINDS)}")
    size, channels, own, seen = KINDS[args.data]
    size, normalization = args.image_size or size, normalization or own
    build = digits if args.data == "digits" else folders
    if args.data.startswith("cifar") and not (Path(args.data_dir) / "val").is_dir():
        build = cifar
    classes, parts = build(args, size, seen, normalization, device, train)
    if train and args.holdout:
        if args.data == "digits" or not 0 < args.holdout < len(parts["train"]):
            raise ValueError(f"--holdout {args.holdout}: hold out fewer images than there are for training "
                             f"({len(parts['train'])}); digits come with a validation part of their own")  # fmt: skip
        order = torch.randperm(len(parts["train"]), generator=seeded("holdout")).tolist()
        parts["val"] = parts["train plainly"].subset(order[: args.holdout])
        parts["train"] = parts["train"].subset(order[args.holdout :])
    if train and args.labels:
        if args.labels > len(parts["train"]):
            raise ValueError(f"--labels {args.labels}: there are only {len(parts['train'])} training images")
        seed = args.seed if args.subset_seed < 0 else args.subset_seed
        order = torch.randperm(len(parts["train"]), generator=seeded("labels", seed))
        parts["train"] = parts["train"].subset(order[: args.labels].tolist())
    parts = {name: Part(source, args, len(classes), device) for name, source in parts.items()}
    test = parts["test"]
    return Data(classes, channels, size, normalization, parts.get("train"), parts.get("val", test), test)


class Part:
    """Training, validation or test images, as batches on the device. Each rank gets its share of every batch."""

    def __init__(self, source: "Tensors | Files", args, classes: int, device):
        self.source, self.args, self.device = source, args, device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mixes = [mix(alpha=alpha, num_classes=classes)
                 for mix, name in ((v2.MixUp, "mixup"), (v2.CutMix, "cutmix"))
                 if (alpha := getattr(args, name, 0))]  # fmt: skip
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def __len__(self) -> int:
        return len(self.source)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, augmented, mixed batches from step `start` on: this rank's images, and labels (B,) or (B, classes)."""
        seed, batch = self.args.seed, self.args.batch
        steps = len(self) // batch
        order = torch.randperm(len(self), generator=seeded(seed, epoch))[: steps * batch].view(steps, batch)
        share = batch // self.world
        mine = slice(self.rank * share, (self.rank + 1) * share)

        def draw(step: int) -> Callable[[int], Tensor]:  # uniform numbers (B, k): drawn for all ranks, ours returned
            generator = seeded(seed, epoch, step)
            torch.manual_seed(number(seed, epoch, step))  # for what torchvision draws by itself
            return lambda k: torch.rand(batch, k, generator=generator)[mine].to(self.device, non_blocking=True)

        batches = self.source.batches(order[start:, mine], (seed, epoch), lambda i: draw(start + i))
        for step, (images, labels) in enumerate(batches, start):
            torch.manual_seed(number(seed, epoch, step, self.rank))  # for what is random from here on: mixing, drop path
            yield self.mix(images, labels) if self.mix else (images, labels)

    def plainly(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of all images, in order, as they are."""
        order = torch.arange(self.rank, len(self), self.world).split(batch)
        yield from self.source.batches(order)


# Images held on the device -----------------------------------------------------------------------------------------------


class Tensors:
    """Images held on the device, augmented there a whole batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor, prepare: Callable, augment: Callable | None = None):
        self.images, self.labels, self.prepare, self.augment = images, labels, prepare, augment

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: list[int]) -> "Tensors":
        return Tensors(self.images[indices], self.labels[indices], self.prepare, self.augment)

    def batches(self, order, key=None, draw=None) -> Iterator[tuple[Tensor, Tensor]]:
        for step, indices in enumerate(order):
            indices = indices.to(self.images.device, non_blocking=True)  # the host does not wait for the device
            images, labels = self.images[indices], self.labels[indices]
            yield self.augment(images, draw(step)) if draw else self.prepare(images), labels


def digits(args, size, seen, normalization, device, train):
    """Translated cluttered digits: on an empty canvas two 3x3 scraps of other digits, and somewhere the digit itself.

    Where to look is most of the task. Training places digit and scraps anew at every step; validation and test hold four
    fixed placements of each digit. 997 digits are for training, 300 for validation and 500 for test.
    """
    if size != KINDS["digits"][0]:
        raise ValueError(f"--image-size {size}: the canvas of --data digits has {KINDS['digits'][0]} pixels a side")
    file = np.load(Path(__file__).parent / "digits.npz")
    images = torch.from_numpy(file["images"]).to(device) / 16  # 0..1
    labels = torch.from_numpy(file["labels"]).long().to(device)
    test, val, rest = torch.randperm(len(images), generator=seeded("digits")).split([500, 300, 997])
    scraps = images[rest.to(device)]  # the distractors, also of validation and test, come from training digits
    prepare = normaliser(normalization, device)

    def place(images: Tensor, draw) -> Tensor:
        canvas = torch.zeros(len(images), size, size, device=device)
        for u in draw(10).split(5, dim=1):  # two scraps: which digit, cut from where, put where
            scrap = patch(scraps[(u[:, 0] * len(scraps)).long()], (u[:, 1:3] * 6).long(), 3)
            write(canvas, (u[:, 3:5] * (size - 2)).long(), scrap)
        write(canvas, (draw(2) * (size - 7)).long(), images)  # and the digit
        return canvas[:, None]

    def fixed(part: Tensor, name: str) -> Tensors:
        part = part.repeat(4).to(device)
        generator = seeded("digits", name)
        placed = place(images[part], lambda k: torch.rand(len(part), k, generator=generator).to(device))
        return Tensors(placed, labels[part], prepare)

    rest = rest.to(device)
    parts = {"train": Tensors(images[rest], labels[rest], prepare, lambda x, draw: prepare(place(x, draw)))}
    return [str(i) for i in range(10)], parts | {"val": fixed(val, "val"), "test": fixed(test, "test")}


def window(corner: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the side x side windows that begin at `corner` (B, 2), one in each of B pictures."""
    span = torch.arange(side, device=corner.device)
    pictures = torch.arange(len(corner), device=corner.device)
    return pictures[:, None, None], corner[:, :1, None] + span[:, None], corner[:, 1:, None] + span


def patch(pictures: Tensor, corner: Tensor, side: int) -> Tensor:
    return pictures[window(corner, side)]


def write(pictures: Tensor, corner: Tensor, what: Tensor) -> None:
    """Blends `what` (B, side, side) into `pictures` with max."""
    at = window(corner, what.shape[-1])
    pictures[at] = torch.maximum(pictures[at], what)


def cifar(args, size, seen, normalization, device, train):
    if size != 32:
        raise ValueError(f"--image-size {size}: CIFAR images are 32 pixels a side (or point --data-dir at image folders)")
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[args.data]
    first = not dist.is_initialized() or dist.get_rank() == 0
    try:
        if first:
            kind(args.data_dir, download=True)
        if dist.is_initialized():
            dist.barrier()  # the others wait until it is there
        sets = {part: kind(args.data_dir, train=part == "train") for part in ("train", "test")}
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{args.data} is neither at {args.data_dir} nor can it be downloaded ({error}): point --data-dir "
                         "at folders train/CLASS/* and val/CLASS/*") from error  # fmt: skip
    loaded = {part: (rearrange(torch.from_numpy(s.data), "b h w c -> b c h w").contiguous(), torch.tensor(s.targets))
              for part, s in sets.items()}  # fmt: skip
    return sets["train"].classes, in_memory(loaded, args, normalization, device)


def in_memory(loaded: dict[str, tuple[Tensor, Tensor]], args, normalization, device) -> dict[str, Tensors]:
    prepare = normaliser(normalization, device)
    randaugment = v2.RandAugment(2, args.randaugment) if getattr(args, "randaugment", 0) else None

    def augment(images: Tensor, draw) -> Tensor:
        if randaugment:  # the same operation for 1/16 of the batch: a few kernels instead of thousands
            images = torch.cat([randaugment(group) for group in images.chunk(16)])
        return erase(crop_and_flip(prepare(images), draw, args.crop_area), draw, args.erase)

    parts = {}
    for name, (images, labels) in loaded.items():
        tensors = images.to(device), labels.to(device)
        parts[name] = Tensors(*tensors, prepare, augment if name == "train" else None)
        if name == "train":
            parts["train plainly"] = parts[name]
    return parts


def normaliser(normalization, device) -> Callable[[Tensor], Tensor]:
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in normalization)
    scale = {torch.uint8: 255.0, torch.float32: 1.0}
    return lambda images: (images / scale[images.dtype] - mean) / std


def crop_and_flip(images: Tensor, draw, area: float) -> Tensor:
    """RandomResizedCrop of at least `area` of the image (0: a shift by up to 1/8 of its side), and half the time a flip.

    One affine resampling for the whole batch, each image its own.
    """
    u = draw(5)
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
    theta = torch.stack([torch.stack([w * flip, zero, x], 1), torch.stack([zero, h, y], 1)], 1)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic" if area else "bilinear", align_corners=False)


def erase(images: Tensor, draw, probability: float) -> Tensor:
    """Random erasing (Zhong et al. 2020), noise in a box of 2 % to 33 % of the image, each image its own box."""
    if not probability:
        return images
    u, size = draw(5), images.shape[-1]
    share, ratio = 0.02 + 0.31 * u[:, 1], torch.exp((2 * u[:, 2] - 1) * np.log(1 / 0.3))
    h, w = (share * ratio).sqrt().clamp(max=1) * size, (share / ratio).sqrt().clamp(max=1) * size
    top, left = u[:, 3] * (size - h), u[:, 4] * (size - w)
    line = torch.arange(size, device=images.device) + 0.5
    rows = (line > top[:, None]) & (line < (top + h)[:, None])
    columns = (line > left[:, None]) & (line < (left + w)[:, None])
    box = (rows[:, :, None] & columns[:, None, :] & (u[:, :1, None] < probability))[:, None]
    return torch.where(box, torch.randn_like(images), images)


# Images in files -----------------------------------------------------------------------------------------------------------


def folders(args, size, seen, normalization, device, train):
    """train/CLASS/* and val/CLASS/* of --data-dir. For evaluation alone, --data-dir/CLASS/* will do as well."""
    root = Path(args.data_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: point --data-dir at one that holds train/CLASS/* and val/CLASS/*")
    places = {"train": root / "train", "test": root / "val"}
    if not train:
        places = {"test": root / "val" if (root / "val").is_dir() else root}
    sets = {}
    for part, place in places.items():
        try:
            sets[part] = datasets.ImageFolder(str(place))
        except FileNotFoundError as error:  # it says which classes are empty
            raise FileNotFoundError(f"{place} is no folder of classes with images in them: {error}") from None
    classes = sets["test" if not train else "train"].classes
    if train and sets["test"].classes != classes:
        odd = sorted(set(classes) ^ set(sets["test"].classes))
        raise ValueError(f"{root}/train and {root}/val have different classes: {', '.join(odd[:5])} in one of them only")

    samples = {part: s.samples for part, s in sets.items()}
    everything = sum(len(s) for s in samples.values())
    if everything * 3 * size * size > args.memory * 2**30:
        prepare = normaliser(normalization, device)  # what is cheap for a batch on a GPU, workers need not do
        parts = {part: Files(s, shrink(size, seen), args, device, prepare) for part, s in samples.items()}
        if train:
            parts["train plainly"] = parts["train"]
            on_pil = [v2.ToPILImage(), v2.RandAugment(2, args.randaugment), v2.PILToTensor()]  # faster there than on tensors
            crop = v2.Compose([
                v2.RandomResizedCrop(size, (args.crop_area or 1.0, 1.0), interpolation=InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                *(on_pil if args.randaugment else []),
            ])  # fmt: skip
            parts["train"] = Files(samples["train"], crop, args, device, prepare,
                                   lambda images, draw: erase(prepare(images), draw, args.erase))  # fmt: skip
        return classes, parts

    loaded = {}
    for part, s in samples.items():  # decoded once: for training the whole square, for evaluation its centre
        whole = Files(s, shrink(size, 1.0 if part == "train" else seen), args, torch.device("cpu"), lambda images: images)
        batches = whole.batches(torch.arange(len(s)).split(256))
        images, labels = (torch.cat(x) for x in zip(*batches, strict=True))
        loaded[part] = images, labels
    return classes, in_memory(loaded, args, normalization, device)


def shrink(size: int, seen: float) -> v2.Transform:
    return v2.Compose([v2.Resize(round(size / seen), interpolation=InterpolationMode.BICUBIC), v2.CenterCrop(size)])


def decode(path: str) -> Tensor:
    """uint8 (3, H, W). JPEGs by torchvision, which is faster than PIL; all others, and what it refuses, by PIL."""
    if path.lower().endswith((".jpg", ".jpeg")):
        with contextlib.suppress(RuntimeError):  # such as PNGs that are called .jpg
            return io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB)
    return v2.functional.pil_to_tensor(datasets.folder.default_loader(path))


class Files(Dataset):
    """Images decoded and cropped by worker processes, each seeded by (seed, epoch, its number), the rest on the device."""

    def __init__(self, samples: list, crop: Callable, args, device, prepare: Callable, augment: Callable | None = None):
        self.samples, self.crop, self.args, self.device = samples, crop, args, device
        self.prepare, self.augment = prepare, augment
        self.unreadable: set[str] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def subset(self, indices: list[int]) -> "Files":
        return Files([self.samples[i] for i in indices], self.crop, self.args, self.device, self.prepare, self.augment)

    def __getitem__(self, key: tuple) -> tuple[Tensor | None, int | str]:
        *seed, index = key
        path, label = self.samples[index]
        try:
            image = decode(path)
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... : all say it is unreadable
            return None, f"{path} ({error})"
        if seed:
            torch.manual_seed(number(*seed, index))
        return self.crop(image), label

    def collate(self, samples: list) -> tuple[Tensor, Tensor, list[str]]:
        good = [(image, label) for image, label in samples if image is not None]
        images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
        return images, torch.tensor([label for _, label in good]), [why for image, why in samples if image is None]

    def batches(self, order, key=(), draw=None) -> Iterator[tuple[Tensor, Tensor]]:
        workers = min(self.args.workers, len(order), cores())
        loader = DataLoader(self, batch_sampler=Keys(order, key), num_workers=workers,
                            collate_fn=self.collate, pin_memory=self.device.type == "cuda")  # fmt: skip
        for step, (images, labels, bad) in enumerate(loader):
            if bad and not self.args.skip_unreadable:
                raise ValueError(f"cannot read image {bad[0]}: mend or remove it, or pass --skip-unreadable")
            new = set(bad) - self.unreadable
            self.unreadable |= new
            if new:
                print(f"skipped {len(self.unreadable)} unreadable image(s) so far, the last one {sorted(new)[-1]}")
            if len(labels):
                images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
                if draw:
                    numbers = draw(step)
                    images = self.augment(images, lambda k: numbers(k)[: len(images)])
                yield images if draw else self.prepare(images), labels


class Keys:
    """What a DataLoader asks of a data set, batch by batch: (seed, epoch, number of an image)."""

    def __init__(self, order: Sequence[Tensor], key: tuple):
        self.order, self.key = order, key

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple]]:
        return ([(*self.key, i) for i in indices.tolist()] for indices in self.order)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def number(*parts) -> int:
    """A seed that is a function of all of `parts`: nearby parts give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def seeded(*parts) -> torch.Generator:
    return torch.Generator().manual_seed(number(*parts))
