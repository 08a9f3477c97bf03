"""What the data can deliver: images/s as a method gets them, and no more to do.

python -m speed.loader                         images in memory
python -m speed.loader --data-dir /imagenet    JPEG files too
"""

import launch
from launch import print0

import statistics
import time
from functools import partial
from pathlib import Path

import torch

import data
import finetune
from augment import Augment, Normalise
from image_files import cores
from settings import Setting, Settings, parse_settings, pick
from speed.measure import RECORD, Records, seconds

SETTINGS = pick("data_dir", "workers", "device") | {
    "batch": Setting(64, "images at a time", low=1),
    **RECORD,
}
parse = partial(parse_settings, __doc__, SETTINGS)


def rate(view: data.Train, device: torch.device, least: float = 5.0) -> float:
    """images/s over at least `least` seconds, once the first batch, with its workers, is there."""
    if len(view) < view.batch:
        raise ValueError(f"--batch {view.batch} is more than the {len(view)} training images")
    begun, count = None, 0
    for epoch in range(10**6):
        for images, _ in view.epoch(epoch):
            if begun:
                count += len(images)
            else:
                begun = time.perf_counter()
            if time.perf_counter() - begun > least:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                return count / (time.perf_counter() - begun)


def cifar_rate(device: torch.device) -> float:
    """Of made-up images of CIFAR's size, on the device."""
    recipe = finetune.parse(["--data", "cifar10", "--device", device.type])
    images = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (50_000,))
    source = data.Tensors(images.to(device), labels.to(device))
    augment = Augment(recipe, Normalise(data.KINDS["cifar10"].normalization, device))
    return rate(data.Train(source, augment, recipe, 10, device), device)


def jpeg_view(settings: Settings, folder: Path, workers: int, device: torch.device) -> data.Train:
    argv = ["--data", "imagenet", "--data-dir", str(folder), "--device", settings.device]
    argv += ["--batch", str(settings.batch), "--memory", "0", "--workers", str(workers)]
    return data.load(finetune.parse(argv), device).train


def gpu_decoding_rate(view: data.Train, device: torch.device) -> float:
    """Of JPEG files decoded, and nothing else, on the GPU."""
    from torchvision import io

    paths = [
        path for path, _ in view.source.samples[:256] if path.lower().endswith(("jpg", "jpeg"))
    ]
    files = [io.read_file(path) for path in paths]
    decode = partial(io.decode_jpeg, files, mode=io.ImageReadMode.RGB, device="cuda")
    return len(files) / statistics.median(seconds(decode, device) for _ in range(5))


def main(settings: Settings) -> dict:
    device, table = launch.device(settings.device), {}
    records = Records(settings, device)

    def note(name: str, speed: float) -> None:
        table[name] = round(speed, 1)
        print0(f"{name:52} {speed:12,.0f} images/s")

    note("CIFAR on the device, augmented and mixed", cifar_rate(device))
    folder = Path(settings.data_dir or "data/imagenet")
    if folder.is_dir():
        for workers in dict.fromkeys((1, min(settings.workers, cores()))):
            view = jpeg_view(settings, folder, workers, device)
            note(
                f"JPEG files, {workers} worker{'s' * (workers > 1)} on {cores()} cores",
                rate(view, device),
            )
        if device.type == "cuda":
            note("JPEG files, decoded alone, on the GPU", gpu_decoding_rate(view, device))
    else:
        print0(
            f"no folder {folder}: point --data-dir at train/CLASS/* and val/CLASS/* to time JPEGs"
        )
    return records.add("speed.loader", {"images_per_s": table, "cores": cores()})


if __name__ == "__main__":
    launch.run(main, parse)
