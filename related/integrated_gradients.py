"""Integrated gradients as a hint: images with what a teacher saw in them laid over.

Hernandez, Chang and Nordling (arXiv 2506.14440). What a pixel x contributed to
a net's F, on the way from a black image x0 (Sundararajan et al. 2017):

    IG = (x - x0) * mean over a in 0..1 of  d F(x0 + a (x - x0)) / d x

These maps of a teacher are computed once. While a small student learns, some
images (--overlay) are half image, half map; beside it the teacher's softened
classes, and attention transfer at one middle layer (related/activations.py),
both of the image itself.

    python -m related.integrated_gradients               trains a teacher first
    python -m related.integrated_gradients --kd-weight 0.3 --at-weight 1000 \\
        --out runs/all
    python -m related.integrated_gradients --overlay 0 --out runs/no   control

The maps belong to images as they are: so the images are those of the first
epochs (--bank), cropped and placed once, instead of new ones at each step. Here
F is the logit of the true class and x0 black; the authors' code takes gradients
of all classes' probabilities at the mean colour, leaves out (x - x0), and
raises the map to a random power between 1 and 2.
"""

import launch
from launch import Failed, counted, print0

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import checkpoints
import data
import finetune
import runs
import storage
import train
from augment import Draws, Normalise
from related import activations
from related.wide_resnet import WideResNet
from settings import Setting, Settings, change, parse_settings

SETTINGS = change(  # a bank holds each digit in five places
    activations.SETTINGS,
    #             digits cifar
    epochs=       (12,   100),
    warmup=       (1,    5),
    eval_every=   (4,    5),
    mixup=        0.0,
    cutmix=       0.0,
    at_weight=    0.0,
    temperature=  2.5,
) | {
    "overlay": Setting(0.1, "probability that a map is laid over an image", high=1),
    "bank": Setting((5, 1), "epochs whose images, as they show them, are learned from", low=1),
    "path": Setting(16, "points on the way from black at which gradients are taken", low=2),
}  # fmt: skip
parse = partial(parse_settings, __doc__, SETTINGS)


def integrated_gradients(
    net: Callable, images: Tensor, labels: Tensor, black: Tensor, points: int
) -> Tensor:
    """What each pixel contributed to the logit of `labels`: (B, C, H, W), by the trapezoidal rule.

    `black`: what broadcasts to an image without anything. The sum over an image is
    F(image) - F(black), but for the rule's error.
    """
    total, step = torch.zeros_like(images), 1 / (points - 1)
    for i in range(points):
        x = (black + i * step * (images - black)).requires_grad_(True)
        chosen = net(x).gather(1, labels[:, None]).sum()
        weight = step / 2 if i in (0, points - 1) else step
        total += weight * torch.autograd.grad(chosen, x)[0]
    return (images - black) * total


def hint(gradients: Tensor) -> Tensor:
    """As a picture: (B, 1, H, W) from 0 to 1, the strongest place of each image 1."""
    strength = gradients.abs().sum(dim=1, keepdim=True)
    return strength / strength.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)


def lay_over(images: Tensor, draws: Draws, overlay: float, normalise: Normalise) -> Tensor:
    """Of images with their map as a last channel some, half image and half map; the rest as is.

    In the channels behind them: the images themselves.
    """
    images, maps = images[:, :-1], images[:, -1:]
    drawn = draws.uniform(1)[:, :, None, None] < overlay
    mixed = torch.where(drawn, 0.5 * images + 0.5 * normalise(maps), images)
    return torch.cat([mixed, images], dim=1)


def loss(student: WideResNet, images, labels, teacher: WideResNet, settings: Settings):
    """As of activation transfer, of the middle group; the student sees the maps laid over."""
    shown, images = images.chunk(2, dim=1)
    return activations.loss(student, images, labels, teacher, settings, shown, groups=(1,))


def task(settings: Settings, dataset: data.Data | None = None) -> train.Task:
    """Everything that train.fit needs. `dataset`: used instead of what the settings name."""
    device = launch.device(settings.device)
    dataset = dataset or data.load(settings, device)
    source = activations.find_teacher(settings, dataset)
    build = partial(WideResNet, channels=dataset.channels, classes=len(dataset.classes))
    teacher = activations.frozen(source, build("teacher")).to(device)
    torch.manual_seed(settings.seed)
    student = build(settings.model).to(device)
    dataset = with_maps(dataset, teacher, source, settings)
    return train.Task(
        "integrated_gradients",
        student,
        dataset,
        loss=partial(loss, teacher=teacher, settings=settings),
        predict=finetune.predict,
        export=activations.export,
        teacher=source,
    )


def with_maps(
    dataset: data.Data, teacher: WideResNet, source: checkpoints.Checkpoint, settings: Settings
) -> data.Data:
    """The same data set, its training images those of the bank, each with its map."""
    kept, device = Path(source.source).with_name("integrated-gradients.pt"), dataset.train.device
    bank, labels = dataset.train.first(settings.bank * len(dataset.train))
    which = checkpoints.fingerprint({"images": bank.cpu(), "labels": labels.cpu()})
    which = {"of": which, "points": settings.path, "teacher": source.fingerprint}
    maps = remembered(kept, which)
    if maps is None:
        black = dataset.normalise(torch.zeros(1, dataset.channels, 1, 1, device=device))
        pieces = list(zip(bank.split(100), labels.split(100), strict=True))
        made = [
            hint(integrated_gradients(teacher, *piece, black, settings.path))
            for piece in counted(pieces, len(pieces), "batches of maps")
        ]
        maps = torch.cat(made).cpu()
        remember(kept, {"which": which, "maps": maps})
    both = torch.cat([bank, maps.to(device)], dim=1)
    augment = partial(lay_over, overlay=settings.overlay, normalise=dataset.normalise)
    source = data.Tensors(both, labels)
    view = data.Train(source, augment, settings, len(dataset.classes), device)
    return replace(dataset, train=view, channels=2 * dataset.channels)


def remembered(path: Path, which: dict) -> Tensor | None:
    """The maps of a run before, if they are of these images."""
    try:
        found = storage.read(path)
        return found["maps"] if found["which"] == which else None
    except (OSError, ValueError, LookupError, TypeError):  # none, damaged, or something else
        return None


def remember(path: Path, maps: dict) -> None:
    own = path.with_name(f"{path.stem}-{os.getpid()}.pt")  # others may do the same at this time
    try:
        storage.save(maps, own)
        os.replace(own, path)
    except (Failed, OSError) as error:
        print0(f"note: the maps cannot be kept for other runs ({error})")


def main(settings: Settings) -> dict:
    runs.check(settings, "integrated_gradients")
    return train.fit(task(settings), settings)


if __name__ == "__main__":
    launch.run(main, parse)
