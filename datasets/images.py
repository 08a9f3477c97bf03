"""Image files: decoded by worker processes or held in memory, cropped, in batches."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import io
from torchvision.transforms import InterpolationMode, v2

from common.augment import hash_seed, rand_augment, reseed
from common.launch import count, print0

BICUBIC = InterpolationMode.BICUBIC
HELD = 2**31  # bytes of decoded images that are kept in memory


def read_image(path: str) -> Tensor:
    """As `decode`. ValueError names an image that cannot be read."""
    try:
        return decode(path)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot read image {path} ({reason}): repair or remove it") from error


def decode(path: str) -> Tensor:
    """uint8 (3, H, W), upright. torchvision decodes JPEGs, fast; PIL the rest."""
    if path.lower().endswith((".jpg", ".jpeg")):
        with contextlib.suppress(RuntimeError):  # such as PNGs called .jpg
            how = dict(mode=io.ImageReadMode.RGB, apply_exif_orientation=True)
            return io.decode_jpeg(io.read_file(path), **how)
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers: save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
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
        shift = v2.RandomCrop(size, padding=size // 8, fill=[round(255 * x) for x in mean])
        steps = [v2.Resize(size, interpolation=BICUBIC), v2.CenterCrop(size), shift]
    steps.append(v2.RandomHorizontalFlip())
    if settings.randaugment:  # faster on PIL images than on tensors
        augment = rand_augment(settings.randaugment, mean, "bicubic")
        steps += [v2.ToPILImage(), augment, v2.PILToTensor()]
    return v2.Compose(steps)


@dataclass(eq=False)
class Files(Dataset):
    """Images in files, cropped when a batch asks: at random to train, else in the centre."""

    samples: list[tuple[str, int]]  # path, label
    names: list[str]  # the same wherever their folder lies
    size: int
    crop_pct: float
    settings: Any
    mean: tuple[float, ...]  # the colour of gaps
    device: torch.device  # where batches go
    held: list[Tensor] | None = None  # the decoded images, if they fit in memory

    def __post_init__(self):
        self.centre_crop = centre_crop(self.size, self.crop_pct)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> Tensor:
        return torch.tensor([label for _, label in self.samples])

    @property
    def hashes(self) -> Tensor:
        """Of names, sizes and last bytes: what a checkpoint remembers of its training images."""
        with ThreadPoolExecutor(32) as pool:  # a million files, perhaps on a network's disk
            ends = pool.map(read_end, [path for path, _ in self.samples])
            facts = zip(self.names, ends, strict=True)
            return torch.tensor([hash_seed(*fact) for fact in facts])

    def subset(self, indices: Sequence[int]) -> "Files":
        names = [self.names[i] for i in indices]
        return replace(self, samples=[self.samples[i] for i in indices], names=names)

    def hold(self, centred: bool = False) -> Tensor | None:
        """Decodes all images now, if they fit in memory. Returns them if all have the final size.

        What cannot be read is left out, and named. `centred`: cropped as evaluation sees them.
        """
        if len(self) * 3 * self.size**2 > HELD:
            return None
        found, bad, left = {}, [], HELD
        with ThreadPoolExecutor(count_cores()) as pool:
            prepare = self.crop_centre if centred else self.shrink
            jobs = [pool.submit(prepare, i) for i in range(len(self))]
            for i, job in enumerate(count(jobs, len(jobs), "images decoded")):
                try:
                    found[i] = job.result()
                    left -= found[i].numel()
                except ValueError as error:
                    bad.append(error)
                if left < 0:
                    pool.shutdown(cancel_futures=True)
                    return None
        if not found:
            raise bad[0]
        if bad:
            print0(f"note: {len(bad)} unreadable image(s) left out: {bad[0]}")
        self.samples, self.names = [self.samples[i] for i in found], [self.names[i] for i in found]
        images = list(found.values())
        if {image.shape[1:] for image in images} == {(self.size, self.size)}:
            return torch.stack(images)
        self.held = images
        return None

    def crop_centre(self, index: int) -> Tensor:
        return self.centre_crop(read_image(self.samples[index][0]))

    def shrink(self, index: int) -> Tensor:
        """What training crops are cut from: as large as the smallest of them needs, no larger."""
        area, image = self.settings.crop_area, read_image(self.samples[index][0])
        side = math.ceil(self.size / math.sqrt(area) if area else self.size)
        if min(image.shape[-2:]) <= side:
            return image
        return v2.functional.resize(image, [side], interpolation=BICUBIC)

    def batches(self, order, key: tuple = ()) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (uint8) and labels of each row of `order`. key: (seed, epoch) of random crops."""
        pin = self.device.type == "cuda"
        workers = min(self.settings.workers, len(order), count_cores())
        if self.held and not pin:
            workers = 0  # to crop alone is less work than to start them
        if key:
            self.random_crop = random_crop(self.size, self.settings, self.mean)
        loader = DataLoader(
            self,
            batch_sampler=([(*key, i) for i in indices.tolist()] for indices in order),
            num_workers=workers,
            pin_memory=pin,
            worker_init_fn=leave_group,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )
        try:
            yield from loader
        except (ConnectionError, EOFError):  # a worker was killed, in the middle of a batch
            time.sleep(5)  # torch's own error, which says so, arrives by a signal
            raise

    def __getitem__(self, key: tuple) -> tuple[Tensor, int]:
        *seed, index = key
        label = self.samples[index][1]
        if not seed:
            return self.crop_centre(index), label
        image = self.held[index] if self.held else self.shrink(index)
        reseed(torch.device("cpu"), *seed, index)
        return self.random_crop(image), label


def read_end(path: str) -> tuple[int, bytes]:
    """A file's size, and its last bytes. Images may have equal names and sizes."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 256))
            return size, file.read()
    except OSError:  # unreadable, or removed while it was trained on
        return 0, b""


def leave_group(_: int) -> None:
    """Workers serve until the run has saved: torchrun and Ctrl-C send signals to a whole group."""
    if hasattr(os, "setsid"):
        os.setsid()


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
