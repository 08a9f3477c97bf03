"""Image files: decoded by worker processes or held in memory, cropped, in batches."""

from launch import counted, from_all, print0, rank, world

import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import io
from torchvision.transforms import InterpolationMode, v2

import storage
from augment import rand_augment, reseed

BICUBIC = InterpolationMode.BICUBIC
ADVICE = "mend or remove it, or pass --skip-unreadable"


# Pixels -----------------------------------------------------------------------------------------


def read(path: str, advice: str = "mend or remove it") -> Tensor:
    """As `decode`, but what cannot be read is a ValueError that names it."""
    try:
        return decode(path)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot read image {path} ({reason}): {advice}") from error


def decode(path: str) -> Tensor:
    """uint8 (3, H, W), upright. JPEGs by torchvision, which is fast; others, and what it refuses,
    by PIL."""
    if path.lower().endswith((".jpg", ".jpeg")):
        with contextlib.suppress(RuntimeError):  # such as PNGs that are called .jpg
            return io.decode_jpeg(
                io.read_file(path), mode=io.ImageReadMode.RGB, apply_exif_orientation=True
            )
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
    """RandomResizedCrop of at least --crop-area, a flip, RandAugment.

    With --crop-area 0 the central square, shifted by up to 1/8 of its side.
    """
    if settings.crop_area:
        steps = [v2.RandomResizedCrop(size, (settings.crop_area, 1.0), interpolation=BICUBIC)]
    else:
        fill = [round(255 * x) for x in mean]
        shift = v2.RandomCrop(size, padding=size // 8, fill=fill)
        steps = [v2.Resize(size, interpolation=BICUBIC), v2.CenterCrop(size), shift]
    steps.append(v2.RandomHorizontalFlip())
    if settings.randaugment:  # which is faster on PIL images than on tensors
        augment = rand_augment(settings.randaugment, mean, BICUBIC)
        steps += [v2.ToPILImage(), augment, v2.PILToTensor()]
    return v2.Compose(steps)


def shrink(image: Tensor, side: int) -> Tensor:
    """The image with a shorter side of at most `side`."""
    if min(image.shape[-2:]) <= side:
        return image
    return v2.functional.resize(image, [side], interpolation=BICUBIC)


# Those that can be read ------------------------------------------------------------------------


def readable(samples: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Those that can be decoded. All are tried once, by threads; what failed is remembered.

    Each of many processes tries its share; the first decides whether that is needed. ValueError if
    none is left.
    """
    facts = [(path, *size_and_time(path)) for path, _ in samples]
    key = hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
    remembered = Path("runs") / f"unreadable-{key}.json"
    bad = from_all(remembered_in(remembered) if rank() == 0 else None)[0]
    if bad is None:
        shares = from_all(tried([path for path, _ in samples[rank() :: world()]]))
        bad = {path: why for share in shares for path, why in share.items()}
        if rank() == 0:
            remembered.parent.mkdir(exist_ok=True)
            storage.write_text(remembered, json.dumps(bad, indent=1))
    if bad:
        print0(f"{len(bad)} unreadable image(s) left out, such as {next(iter(bad))}")
    kept = [(path, label) for path, label in samples if path not in bad]
    if not kept:
        raise ValueError(f"none of {len(samples)} images can be read, such as {samples[0][0]}")
    return kept


def size_and_time(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:  # a link to nothing
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def remembered_in(path: Path) -> dict[str, str] | None:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def tried(paths: list[str]) -> dict[str, str]:
    """Which cannot be decoded, and why."""
    with ThreadPoolExecutor(cores()) as pool:
        reasons = list(counted(pool.map(why_unreadable, paths), len(paths), "images tried"))
    return {path: why for path, why in zip(paths, reasons, strict=True) if why}


def why_unreadable(path: str) -> str:
    try:
        read(path)
    except ValueError as error:
        return str(error)
    return ""


# A source of batches ----------------------------------------------------------------------------


class Files(Dataset):
    """Images in files, cropped when a batch asks for them: at random to train, else in the centre.

    `pin`: in memory from which they are fast to copy to a GPU.
    """

    def __init__(self, samples: list[tuple[str, int]], size: int, kind, settings, pin: bool):
        self.samples, self.size, self.settings = samples, size, settings
        self.how, self.pin = (size, kind, settings, pin), pin
        self.crop = centre_crop(size, kind.crop_pct)
        self.area = getattr(settings, "crop_area", None)  # evaluation knows no random crop
        if self.area is not None:
            self.random_crop = random_crop(size, settings, kind.normalization[0])
        self.held: list[Tensor] | None = None  # the decoded images, if they fit in memory

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> Tensor:
        return torch.tensor([label for _, label in self.samples])

    @property
    def names(self) -> list[str]:
        """CLASS/.../FILE of each, wherever the folder is."""
        root = os.path.commonpath({os.path.dirname(path) for path, _ in self.samples})
        return [path[len(root) :].lstrip(os.sep).replace(os.sep, "/") for path, _ in self.samples]

    @property
    def fingerprint(self) -> str:
        """Of which files these are: by all names, and the sizes of about a thousand."""
        some = self.samples[:: max(1, len(self) // 1000)]
        facts = self.names, [size_and_time(path)[0] for path, _ in some]
        return hashlib.blake2b(repr(facts).encode(), digest_size=6).hexdigest()

    def subset(self, indices: list[int]) -> "Files":
        return Files([self.samples[i] for i in indices], *self.how)

    def readable(self) -> "Files":
        """With --skip-unreadable: without those that cannot be decoded."""
        if not self.settings.skip_unreadable:
            return self
        kept = Files(readable(self.samples), *self.how)
        if lost := set(self.labels.tolist()) - set(kept.labels.tolist()):
            odd = next(path for path, label in self.samples if label in lost)
            raise ValueError(f"of a class no image can be read, such as {odd}: remove its folder")
        return kept

    def may_fit(self) -> bool:
        """Whether all crops fit in --memory."""
        return len(self) * 3 * self.size**2 <= self.settings.memory * 2**30

    def hold(self) -> bool:
        """Decodes all images now, if they take no more than --memory. Whether they do."""
        if not self.may_fit():
            return False
        held, left, pool = [], self.settings.memory * 2**30, ThreadPoolExecutor(cores())
        try:
            images = pool.map(self.pixels, range(len(self)))
            for image in counted(images, len(self), "images decoded"):
                held.append(image)
                left -= image.numel()
                if left < 0:
                    return False
        finally:
            pool.shutdown(cancel_futures=True)
        self.held = held
        return True

    def batches(self, order, key: tuple = ()) -> Iterator[tuple[Tensor, Tensor]]:
        """The images (uint8) and labels of each row of `order`, on the CPU.

        With a key (seed, epoch) they are cropped at random, each seeded by the key and its number.
        ValueError for an image that cannot be read.
        """
        workers = min(self.settings.workers, len(order), cores())
        if self.held and not self.pin:
            workers = 0  # to crop alone is less work than to start them
        keys = ([(*key, i) for i in indices.tolist()] for indices in order)
        loader = DataLoader(
            self,
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=self.pin,
            worker_init_fn=obey_the_run_alone,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )
        with signals_held():
            loaded = iter(loader)
        for images, labels, bad in loaded:
            if bad:
                raise ValueError(bad)
            yield images, labels

    def __getitem__(self, key: tuple) -> tuple[Tensor | None, int | str]:
        *seed, index = key
        path, label = self.samples[index]
        try:
            if not seed:
                return self.crop(read(path, ADVICE)), label
            image = self.held[index] if self.held else self.pixels(index)
        except ValueError as error:  # a worker's exception would come with its traceback
            return None, str(error)
        reseed(torch.device("cpu"), *seed, index)
        return self.random_crop(image), label

    def pixels(self, index: int) -> Tensor:
        """What training crops are cut from: large enough for the smallest of them, no larger."""
        side = self.size / math.sqrt(self.area) if self.area else self.size
        return shrink(read(self.samples[index][0], ADVICE), math.ceil(side))


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Processes started in it are not ended by SIGTERM and Ctrl-C, which are sent to workers too.

    The run that they serve has yet to save.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where none is sent to a group
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_the_run_alone(_: int) -> None:
    """In a worker, for which signals are held: only a SIGTERM of the run that it serves ends it.

    When that leaves, Python ends by SIGTERM what it has started, and waits for it.
    """

    def listen() -> None:
        while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # on Linux
        threading.Thread(target=listen, daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))


def collate(samples: list) -> tuple[Tensor, Tensor, str]:
    """Images and labels; and what is wrong with an image, if one is."""
    for image, why in samples:
        if image is None:
            return torch.empty(0), torch.empty(0), why
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), ""


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
