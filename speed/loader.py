"""What the data can deliver: images/s as a method gets them, with nothing else to do.

python -m speed.loader                         images in memory
python -m speed.loader --data-dir /imagenet    JPEG files too
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import data
import recipes
from common import launch
from common.augment import Augment
from common.launch import print0
from common.settings import parse_settings, setting
from datasets import folders, sources
from datasets.images import count_cores
from speed import measure


@dataclass(frozen=True)
class Settings(measure.Settings):
    data_dir: str = setting("data/imagenet", "holds train/CLASS/* and val/CLASS/*")
    workers: int = setting(8, "processes that decode images", low=1)
    batch: int = setting(64, "JPEG images at a time", low=1)


parse = partial(parse_settings, __doc__, Settings, {})


def measure_rate(view: data.Train, device: torch.device, least: float = 5.0) -> float:
    """images/s over at least `least` seconds, after the first batch, which starts the workers."""
    began, count = None, 0
    for epoch in range(10**6):
        for images, _ in view.epoch(epoch):
            if began:
                count += len(images)
            else:
                began = time.perf_counter()
            if time.perf_counter() - began > least:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                return count / (time.perf_counter() - began)


def view_cifar(device: torch.device) -> data.Train:
    """Made-up images of CIFAR's size, on the device."""
    recipe = recipes.Settings(**recipes.RECIPES["cifar_gpu"])
    images = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (50_000,))
    source = sources.Tensors(images.to(device), labels.to(device))
    augment = Augment(recipe, recipes.DATA_SETS["cifar10"], device)
    return data.Train(source, augment, recipe, 10, device)


def view_jpegs(settings: Settings, folder: Path, workers: int, device) -> data.Train:
    """Files as training on ImageNet streams them, even if few would fit in memory."""
    changes = dict(data="imagenet", data_dir=str(folder), batch=settings.batch, workers=workers)
    recipe = recipes.Settings(**recipes.RECIPES["imagenet"] | changes)
    kind = recipes.DATA_SETS["imagenet"]
    parts = folders.load(recipe, kind, kind.image_size, device)
    augment = Augment(recipe, kind, device, cropped=True)
    return data.Train(parts.train, augment, recipe, len(parts.classes), device)


def main(settings: Settings) -> dict:
    device, table = launch.get_device(settings.device), {}

    def note(name: str, speed: float) -> None:
        table[name] = round(speed, 1)
        print0(f"{name:52} {speed:12,.0f} images/s")

    note("CIFAR on the device, augmented and mixed", measure_rate(view_cifar(device), device))
    folder, cores = Path(settings.data_dir), count_cores()
    if folder.is_dir():
        for workers in dict.fromkeys((1, min(settings.workers, cores))):
            view = view_jpegs(settings, folder, workers, device)
            name = f"JPEG files, {workers} worker{'s' * (workers > 1)} on {cores} cores"
            note(name, measure_rate(view, device))
    else:
        print0(f"no folder {folder}: to time JPEGs, let --data-dir hold train/CLASS/*")
    found = {"images_per_s": table, "cores": cores}
    return measure.add_record(settings, device, "speed.loader", found)


if __name__ == "__main__":
    launch.run(main, parse)
