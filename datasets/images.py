"""Image files: decoded by worker processes or cached, cropped, in batches."""

import contextlib
import hashlib
import itertools
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import io
from torchvision.transforms import InterpolationMode, v2

from common.augment import hash_seed, rand_augment, reseed
from common.launch import collect, print0, rank, world
from datasets.sources import Tensors

BICUBIC = InterpolationMode.BICUBIC
DEEP = re.compile("^[IF]|;16[BLN]")  # modes of PIL and of its decoders with more than 8 bits
ORIENTATION = ExifTags.Base.Orientation  # 1: upright
CACHE = 2**31  # bytes of decoded images that are kept in memory


def read_image(path: str) -> Tensor:
    """As `decode`. ValueError names an image that cannot be read."""
    try:
        return decode(path)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot read image {path} ({reason}): mend or replace it") from error


def decode(path: str) -> Tensor:
    """uint8 (3, H, W), upright, on grey. torchvision decodes JPEGs, fast; PIL the rest."""
    with Image.open(path) as file:
        if file.format in ("JPEG", "MPO") and file.getexif().get(ORIENTATION, 1) == 1:
            with contextlib.suppress(RuntimeError):  # such as CMYK
                return io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB)
        if DEEP.search(f"{file.mode} {file.tile}"):  # PIL would cut them off
            raise ValueError("its pixels have more than 8 bits: save it with 8")
        image = ImageOps.exif_transpose(file)
    if image.has_transparency_data:  # on grey neither black shapes vanish nor white ones
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "grey"), image)
    return v2.functional.pil_to_tensor(image.convert("RGB"))


def centre_crop(size: int, crop_pct: float) -> v2.Transform:
    """What evaluation sees: the central square of `crop_pct` of the shorter side, at `size`."""
    resize = v2.Resize(round(size / crop_pct), interpolation=BICUBIC)
    return v2.Compose([resize, v2.CenterCrop(size)])


def random_crop(size: int, settings, mean: Sequence[float]) -> v2.Transform:
    """RandomResizedCrop (with --crop-area 0 the central square, shifted), a flip, RandAugment."""
    if settings.crop_area:
        steps = [v2.RandomResizedCrop(size, (settings.crop_area, 1.0), interpolation=BICUBIC)]
    else:
        fill = [round(255 * x) for x in mean]
        steps = [centre_crop(size, 1.0), v2.RandomCrop(size, padding=size // 8, fill=fill)]
    steps.append(v2.RandomHorizontalFlip(settings.flip))
    if settings.randaugment:  # faster on PIL images than on tensors
        augment = rand_augment(settings.randaugment, mean, "bicubic")
        steps += [v2.ToPILImage(), augment, v2.PILToTensor()]
    return v2.Compose(steps)


@dataclass(eq=False)
class Files(Dataset):
    """Images in files, cropped when a batch asks: at random to train, else in the centre."""

    paths: list[str]
    names: list[str]  # the same wherever their folder lies
    labels: Tensor
    size: int
    row: Any  # a recipes.DataSet: its mean is the colour of gaps
    settings: Any
    device: torch.device  # where batches go
    contents: Any = None  # hashes of what is in the files (images,)
    kept: list[Tensor] | None = None  # the decoded images, if they fit in memory

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Sequence[int]) -> "Files":
        paths, names = [self.paths[i] for i in indices], [self.names[i] for i in indices]
        labels, contents = self.labels[indices], self.contents[indices]
        return replace(self, paths=paths, names=names, labels=labels, contents=contents, kept=None)

    def look_through(self) -> "Files":
        """Those that can be read, with hashes of their contents. A note names one of the others."""
        print0(f"looking through {len(self):,} images")
        with ThreadPoolExecutor(32) as pool:
            looked = [*pool.map(examine, self.paths[rank() :: world()])]
        rows = itertools.zip_longest(*collect(looked))  # of one image for each process
        found = [x for row in rows for x in row if x is not None]
        good = [i for i, x in enumerate(found) if isinstance(x, int)]
        bad = [x for x in found if isinstance(x, str)]
        if not good:
            raise ValueError(bad[0])
        if bad:
            print0(f"note: {len(bad)} unreadable image(s) left out: {bad[0]}")
        self.contents = torch.tensor([x if isinstance(x, int) else 0 for x in found])
        return self.subset(good)

    def cache(self, centred: bool = False) -> "Files | Tensors":
        """Decoded now if they fit in memory, as Tensors if of one size. `centred`: to evaluate."""
        if len(self) * 3 * self.size**2 > CACHE:
            return self
        images, left = list[Tensor](), CACHE
        with ThreadPoolExecutor(count_cores()) as pool:
            decoded = pool.map(self.crop_centre if centred else self.shrink, range(len(self)))
            for image in decoded:
                images.append(image)
                left -= image.nbytes
                if left < 0:
                    pool.shutdown(cancel_futures=True)
                    return self
        if {image.shape[1:] for image in images} != {(self.size, self.size)}:
            return replace(self, kept=images)
        stacked, labels = torch.stack(images).to(self.device), self.labels.to(self.device)
        return Tensors(stacked, labels, self.names, self.contents)

    def crop_centre(self, index: int) -> Tensor:
        return centre_crop(self.size, self.row.crop_pct)(read_image(self.paths[index]))

    def shrink(self, index: int) -> Tensor:
        """What training crops are cut from: as large as the smallest of them needs, no larger."""
        area, image = self.settings.crop_area, read_image(self.paths[index])
        side = math.ceil(self.size / math.sqrt(area) if area else self.size)
        if min(image.shape[-2:]) <= side:
            return image
        return v2.functional.resize(image, [side], interpolation=BICUBIC)

    def batches(self, order, key: tuple = ()) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (uint8) and labels of each row of `order`. key: (seed, epoch) of random crops."""
        pin = self.device.type == "cuda"  # MPS may copy too late (pytorch#189690)
        usual = min(self.settings.workers, len(order), count_cores())
        workers: Any = 0 if self.kept and not pin else usual  # to crop is less than to start them
        if key:
            self.random_crop = random_crop(self.size, self.settings, self.row.mean)
        rows = ([(*key, i) for i in indices.tolist()] for indices in order)
        start = "fork" if workers and sys.platform == "linux" else None
        how = dict(num_workers=workers, pin_memory=pin, multiprocessing_context=start)
        try:
            for pair in DataLoader(self, batch_sampler=rows, **how):
                images, labels = (x.to(self.device, non_blocking=pin) for x in pair)
                yield images, labels
        except (ConnectionError, EOFError) as error:  # in the middle of a batch
            raise RuntimeError("a DataLoader worker was killed") from error

    def __getitem__(self, key: tuple) -> tuple[Tensor, int]:
        *seed, index = key
        label = int(self.labels[index])
        if not seed:
            return self.crop_centre(index), label
        image = self.kept[index] if self.kept else self.shrink(index)
        reseed(torch.device("cpu"), *seed, index)
        return self.random_crop(image), label


def examine(path: str) -> int | str:
    """A hash of what is in a file, or why it cannot be read.

    Of JPEGs the header and the end are looked at, of PNGs the checksums. Others are decoded.
    """
    whole, parts = False, tuple[Any, ...]()
    with contextlib.suppress(Exception), open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 256))
        end = file.read()
        large = size > 2**16 and path.lower().endswith((".jpg", ".jpeg", ".png", ".webp"))
        file.seek(size // 2 if large else 0)
        some = hashlib.blake2b(file.read(1024 if large else -1)).digest()
        parts = size, end, some  # images may have equal names and sizes
        with Image.open(file) as image:
            image.verify()
            deep, ended = DEEP.search(f"{image.mode} {image.tile}"), b"\xff\xd9" in end
            whole = {"JPEG": ended, "MPO": ended, "PNG": not deep}.get(str(image.format), False)
    try:
        if not whole:
            read_image(path)
    except ValueError as error:
        return str(error)
    return hash_seed(*parts)


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
