"""The baseline that learns nothing: the class of the nearest labelled image, pixel by pixel."""

import launch

import numpy as np
import torch

import data
from settings import Settings

PLACEMENTS = 60  # of each labelled image, augmented as in training


@torch.no_grad()
def nearest(settings: Settings, part: str = "test") -> np.ndarray:
    """Whether each image of a part is of the class of its nearest labelled one: (images,).

    `settings`: those of a run with these images and labels.
    """
    unmixed = settings.but(mixup=0.0, cutmix=0.0)
    dataset = data.load(unmixed, launch.device(settings.device))
    batches = [batch for epoch in range(PLACEMENTS) for batch in dataset.train.epoch(epoch)]
    known, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    correct = [
        labels[torch.cdist(x.flatten(1), known.flatten(1)).argmin(dim=1)] == y
        for x, y in getattr(dataset, part).in_order(256)
    ]
    return torch.cat(correct).cpu().numpy()
