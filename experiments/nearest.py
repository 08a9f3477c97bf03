"""The baseline that learns nothing: the class of the nearest labelled image, pixel by pixel."""

import launch

import numpy as np
import torch

import data
import finetune
from experiments.rows import Flags
from settings import to_argv

PLACEMENTS = 60  # of each labelled image, augmented as in training


@torch.no_grad()
def nearest(flags: Flags, seed: int, part: str = "test") -> np.ndarray:
    """Whether each image of a part is of the class of its nearest labelled one: (images,)."""
    settings = finetune.parse(["--teacher", "none", *to_argv(flags | {"seed": seed})])
    images = data.load(settings, launch.device(settings.device))
    batches = [batch for epoch in range(PLACEMENTS) for batch in images.train.epoch(epoch)]
    known, labels = (
        torch.cat([x.flatten(1) for x, _ in batches]),
        torch.cat([y for _, y in batches]),
    )
    correct = [
        labels[torch.cdist(x.flatten(1), known).argmin(dim=1)] == y
        for x, y in getattr(images, part).in_order(256)
    ]
    return torch.cat(correct).cpu().numpy()
