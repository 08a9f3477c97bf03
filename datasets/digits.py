"""The bundled task: handwritten digits somewhere on a cluttered canvas.

On an empty canvas of 12x12 pixels lie a digit (8x8) and `--distractors` patches of other digits
(3x3). Training places all of them anew at every step. Validation and test hold four fixed
placements of each digit. 997 digits are for training, 300 for validation and 500 for test.

The digits are the 1,797 8x8 images of E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits" (test part), UCI Machine Learning Repository, 1998, CC BY 4.0,
https://doi.org/10.24432/C50P49, as scikit-learn ships them.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.augment import BatchRandom, seeded
from common.settings import parse_layers
from datasets.sources import Parts, Tensors

CANVAS, DIGIT, DISTRACTOR = 12, 8, 3  # pixels a side
PLACES = 4  # of each digit of validation and test
FILE = Path(__file__).parent / "digits.npz"


def load(settings, kind, size: int, device) -> Parts:
    check_augmentation(settings)
    if size != kind.image_size:
        raise ValueError(f"--image-size {size}: --data digits has {kind.image_size}")
    split = Split(settings.distractors, device)
    kinds = parse_layers(settings.classes, 10, "classes")
    parts = split.whole("train"), split.placed("val"), split.placed("test")
    train, val, test = (Tensors(*choose(*part, kinds)) for part in parts)
    return Parts([str(kind) for kind in kinds], train, val, test, split)


def check_augmentation(settings) -> None:
    for name in ("crop_area", "randaugment", "random_erase"):
        if getattr(settings, name, 0):
            raise ValueError(f"--{name.replace('_', '-')}: this data set has its own augmentation")


class Split:
    """The digits in three parts. Called with some, it clutters them: this task's augmentation."""

    def __init__(self, distractors: int, device):
        images, labels = (torch.from_numpy(np.load(FILE)[name]) for name in ("images", "labels"))
        self.images, self.labels = images.to(device) / 16, labels.long().to(device)  # in 0..1
        order = torch.randperm(len(self.images), generator=seeded("digits"))
        parts = (part.to(device) for part in order.split([500, 300, 997]))
        self.parts = dict(zip(("test", "val", "train"), parts, strict=True))
        self.pool = self.images[self.parts["train"]]  # all distractors are cut from these
        self.distractors = distractors

    def __call__(self, digits: Tensor, draws: BatchRandom) -> Tensor:
        """Digits (B, 8, 8) on their canvases (B, 1, 12, 12)."""
        return torch.maximum(*self.place(digits, draws))

    def place(self, digits: Tensor, draws: BatchRandom) -> tuple[Tensor, Tensor]:
        """The digits alone, and the distractors alone, on their canvases: two of (B, 1, 12, 12)."""
        digit, distractors = digits.new_zeros(2, len(digits), CANVAS, CANVAS)
        numbers = draws.uniform(5 * self.distractors).unflatten(1, (self.distractors, 5))
        for u in numbers.unbind(1):  # of each distractor: which digit, cut from where, put where
            source = self.pool[(u[:, 0] * len(self.pool)).long()]
            distractor = source[
                index_windows(compute_corners(u[:, 1:3], DISTRACTOR, DIGIT), DISTRACTOR)
            ]
            paste(distractors, compute_corners(u[:, 3:5], DISTRACTOR, CANVAS), distractor)
        paste(digit, compute_corners(draws.uniform(2), DIGIT, CANVAS), digits)
        return digit[:, None], distractors[:, None]

    def layers(self, name: str) -> tuple[Tensor, Tensor]:
        """`place` of validation or test, PLACES times each digit."""
        part = self.parts[name].repeat(PLACES)
        draws = BatchRandom(seeded("digits", name), len(part), slice(None), self.images.device)
        return self.place(self.images[part], draws)

    def placed(self, name: str) -> tuple[Tensor, Tensor]:
        """Images (PLACES n, 1, 12, 12) and labels of validation or test; i, n + i show one."""
        return torch.maximum(*self.layers(name)), self.labels[self.parts[name].repeat(PLACES)]

    def whole(self, name: str) -> tuple[Tensor, Tensor]:
        """The digits (n, 8, 8) themselves, and their labels."""
        return self.images[self.parts[name]], self.labels[self.parts[name]]


def choose(images: Tensor, labels: Tensor, kinds: list[int]) -> tuple[Tensor, Tensor]:
    """The images of some kinds. Their labels are numbered anew."""
    new = (labels[:, None] == torch.tensor(kinds, device=labels.device)).long()
    asked = new.any(dim=1)
    return images[asked], new[asked].argmax(dim=1)


def compute_corners(u: Tensor, side: int, within: int) -> Tensor:
    """Numbers (B, 2) in 0..1 to corners of squares that lie within a larger one."""
    return (u * (within - side + 1)).long()


def index_windows(corner: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of side x side windows that begin at `corner` (B, 2), one in each of B pictures."""
    span = torch.arange(side, device=corner.device)
    pictures = torch.arange(len(corner), device=corner.device)
    rows, columns = corner[:, :1, None] + span[:, None], corner[:, 1:, None] + span
    return pictures[:, None, None], rows, columns


def paste(pictures: Tensor, corner: Tensor, what: Tensor) -> None:
    """Blends `what` (B, side, side) into `pictures` with max."""
    at = index_windows(corner, what.shape[-1])
    pictures[at] = torch.maximum(pictures[at], what)
