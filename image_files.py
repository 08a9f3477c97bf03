"""Folders of image files: found, decoded by worker processes, cropped there."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, io
from torchvision.transforms import InterpolationMode, v2

from augment import number


def find(root: Path, train: bool) -> dict[str, datasets.ImageFolder]:
    """train/CLASS/* and val/CLASS/* below `root`, as "train" and "test".

    For evaluation alone (train=False) only the test images, which may also lie in root/CLASS/*.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root}: point --data-dir at one that holds train/CLASS/* and val/CLASS/*"
        )
    places = {"train": root / "train", "test": root / "val"}
    if not train:
        places = {"test": root / "val" if (root / "val").is_dir() else root}
    found = {}
    for part, place in places.items():
        try:
            found[part] = datasets.ImageFolder(str(place))
        except FileNotFoundError as error:  # it says which classes are empty
            raise FileNotFoundError(
                f"{place} is no folder of classes with images in them: {error}"
            ) from None
    if train and found["train"].classes != found["test"].classes:
        odd = sorted(set(found["train"].classes) ^ set(found["test"].classes))
        raise ValueError(
            f"{root}/train and {root}/val have different classes: "
            f"{', '.join(odd[:5])} in one of them only"
        )
    return found


def centre_crop(size: int, crop_pct: float) -> v2.Transform:
    """What evaluation sees: the central square of `crop_pct` of the shorter side, at `size`."""
    resize = v2.Resize(round(size / crop_pct), interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([resize, v2.CenterCrop(size)])


def random_crop(size: int, settings) -> v2.Transform:
    """RandomResizedCrop of at least --crop-area (0: the whole), a flip, RandAugment."""
    scale = settings.crop_area or 1.0, 1.0
    crop = v2.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC)
    steps = [crop, v2.RandomHorizontalFlip()]
    if settings.randaugment:  # which is faster on PIL images than on tensors
        steps += [v2.ToPILImage(), v2.RandAugment(2, settings.randaugment), v2.PILToTensor()]
    return v2.Compose(steps)


def decode(path: str) -> Tensor:
    """uint8 (3, H, W). JPEGs by torchvision, which is fast; others, and what it refuses, by PIL."""
    if path.lower().endswith((".jpg", ".jpeg")):
        with contextlib.suppress(RuntimeError):  # such as PNGs that are called .jpg
            return io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB)
    return v2.functional.pil_to_tensor(datasets.folder.default_loader(path))


class Files(Dataset):
    """Images in files, decoded and cropped by worker processes when a batch asks for them."""

    def __init__(
        self, samples: list[tuple[str, int]], crop: Callable, random_crop, settings, pin: bool
    ):
        self.samples, self.settings, self.pin = samples, settings, pin  # pin: for a GPU
        self.crop, self.random_crop = crop, random_crop
        self.unreadable: set[str] = set()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> Tensor:
        return torch.tensor([label for _, label in self.samples])

    def subset(self, indices: list[int]) -> "Files":
        samples = [self.samples[i] for i in indices]
        return Files(samples, self.crop, self.random_crop, self.settings, self.pin)

    def batches(self, order, key: tuple = ()) -> Iterator[tuple[Tensor, Tensor]]:
        """The images (uint8) and labels of each row of `order`, on the CPU.

        With a key (seed, epoch) they are cropped at random, each seeded by the key and its number.
        """
        workers = min(self.settings.workers, len(order), cores())
        loader = DataLoader(
            self,
            batch_sampler=Keys(order, key),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=self.pin,
        )
        for images, labels, bad in loader:
            self.report(bad)
            if len(labels):
                yield images, labels

    def __getitem__(self, key: tuple) -> tuple[Tensor | None, int | str]:
        *seed, index = key
        path, label = self.samples[index]
        try:
            image = decode(path)
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
            return None, f"{path} ({error})"
        if not seed:
            return self.crop(image), label
        torch.manual_seed(number(*seed, index))
        return self.random_crop(image), label

    def report(self, bad: list[str]) -> None:
        if bad and not self.settings.skip_unreadable:
            raise ValueError(
                f"cannot read image {bad[0]}: mend or remove it, or pass --skip-unreadable"
            )
        new = set(bad) - self.unreadable
        self.unreadable |= new
        if new:
            count, last = len(self.unreadable), sorted(new)[-1]
            print(f"skipped {count} unreadable image(s) so far, the last one {last}")


def decode_all(files: Files, device) -> tuple[Tensor, Tensor]:
    """All images of a source, as evaluation sees them (uint8), on the device, and their labels."""
    images, labels = zip(*files.batches(torch.arange(len(files)).split(256)), strict=True)
    return torch.cat(images).to(device), torch.cat(labels).to(device)


def collate(samples: list) -> tuple[Tensor, Tensor, list[str]]:
    """Images that could be read, their labels, and what is wrong with the others."""
    good = [(image, label) for image, label in samples if image is not None]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    labels = torch.tensor([label for _, label in good])
    return images, labels, [why for image, why in samples if image is None]


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
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
