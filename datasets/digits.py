"""The bundled task: handwritten digits somewhere on a cluttered canvas.

On an empty canvas of 12x12 pixels lie a digit (8x8) and `--distractors` patches of other digits
(3x3). Training places all of them anew at every step. Validation and test hold four fixed
placements of each digit. 997 digits are for training, 300 for validation and 500 for test.

The digits are the 1,797 8x8 images of E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits" (test part), UCI Machine Learning Repository, 1998, CC BY 4.0,
https://doi.org/10.24432/C50P49, as scikit-learn ships them.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.augment import BatchRandom, seeded
from common.settings import parse_layers
from datasets.sources import Parts, Tensors

CANVAS, DIGIT, DISTRACTOR = 12, 8, 3  # pixels a side
PLACES = 4  # of each digit of validation and test


def load(settings, row, size: int, device, with_train: bool = True) -> Parts:
    if size != row.image_size:
        raise ValueError(f"--image-size {size}: --data digits has {row.image_size}")
    split = read_parts(device)
    augment = partial(clutter, pool=split["train"][0], distractors=settings.distractors)
    kinds = parse_layers(settings.classes, 10, "classes")
    parts = []
    for name, (images, labels) in split.items():
        if name != "train":  # images i and n + i show one digit
            images, labels = images.repeat(PLACES, 1, 1), labels.repeat(PLACES)
            draws = BatchRandom(seeded("digits", name), len(images), slice(None), device)
            images = augment(images, draws)
        new = labels[:, None] == torch.tensor(kinds, device=device)  # numbers of those asked for
        asked = new.any(dim=1)
        parts.append(Tensors(images[asked], new[asked].long().argmax(dim=1)))
    train, val, test = parts
    return Parts([str(kind) for kind in kinds], train, val, test, augment)


def read_parts(device) -> dict[str, tuple[Tensor, Tensor]]:
    """The digits (n, 8, 8) in 0..1 of "train", "val" and "test", and their labels (n,)."""
    found, sizes = np.load(Path(__file__).with_suffix(".npz")), [500, 300, 997]
    images = torch.from_numpy(found["images"]).to(device) / 16
    labels = torch.from_numpy(found["labels"]).long().to(device)
    order = torch.randperm(len(images), generator=seeded("digits")).to(device)
    test, val, train = zip(images[order].split(sizes), labels[order].split(sizes), strict=True)
    return {"train": train, "val": val, "test": test}


def clutter(digits: Tensor, draws: BatchRandom, pool: Tensor, distractors: int) -> Tensor:
    """Digits (B, 8, 8) on canvases (B, 1, 12, 12), over pieces of other digits from `pool`."""
    canvas = digits.new_zeros(len(digits), CANVAS, CANVAS)
    numbers = draws.uniform(5 * distractors).unflatten(1, (distractors, 5))
    for u in numbers.unbind(1):  # of each distractor: which digit, cut from where, put where
        source = pool[(u[:, 0] * len(pool)).long()]
        cut = index_windows(u[:, 1:3], DISTRACTOR, DIGIT)
        paste(canvas, u[:, 3:5], source[cut])
    paste(canvas, draws.uniform(2), digits)
    return canvas[:, None]


def index_windows(u: Tensor, side: int, within: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of windows, one in each of B pictures. Numbers `u` (B, 2) in 0..1 say where."""
    corner, span = (u * (within - side + 1)).long(), torch.arange(side, device=u.device)
    rows, columns = corner[:, :1, None] + span[:, None], corner[:, 1:, None] + span
    return torch.arange(len(u), device=u.device)[:, None, None], rows, columns


def paste(pictures: Tensor, u: Tensor, what: Tensor) -> None:
    """Blends `what` (B, side, side) into `pictures` with max, where `u` says."""
    at = index_windows(u, what.shape[-1], pictures.shape[-1])
    pictures[at] = torch.maximum(pictures[at], what)
