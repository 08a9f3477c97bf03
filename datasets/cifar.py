"""CIFAR-10 and CIFAR-100: downloaded, or in folders that are there already."""

from pathlib import Path

import torch
from einops import rearrange

from common.launch import run_first
from datasets import folders
from datasets.sources import Parts, Tensors


def load(settings, row, size: int, device, with_train: bool = True) -> Parts:
    name, folder = settings.data, Path(settings.data_dir or f"data/{settings.data}")
    found = folders.list_subfolders(folder) if folder.is_dir() else []
    if not all(name.startswith("cifar-") for name in found):
        return folders.load(settings, row, size, device, with_train)  # cifar-*: torchvision's own
    if size != row.image_size:
        raise ValueError(f"--image-size {size}: --data {name} has {row.image_size}")
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        run_first(lambda: source(folder, download=True))
    except (OSError, RuntimeError) as error:  # offline, or a file that is not the one
        raise ValueError(f"cannot download {name} ({error}): {folders.ADVICE}") from error
    parts = []
    for train in (True, False):
        part = source(folder, train=train)
        images = rearrange(torch.from_numpy(part.data), "b h w c -> b c h w").contiguous()
        parts.append(Tensors(images.to(device), torch.tensor(part.targets, device=device)))
    return Parts(part.classes, train=parts[0], test=parts[1])
