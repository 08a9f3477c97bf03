"""Test images of another kind than the training images, at matched accuracy on the usual ones.

A better model is better under shift too. So a row is compared with what a model trained from
scratch would reach: the line, on the logit scale, through all runs from scratch, of accuracy under
shift over usual accuracy (Miller et al. 2021, "Accuracy on the line").
"""

import launch

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import ensemble
import train
from augment import seeded, to_pixels
from experiments.estimates import BASELINE, described, draws, widened
from experiments.jobs import Job, Made
from experiments.teams import opened


def noisy(pixels: Tensor) -> Tensor:
    noise = torch.randn(pixels.shape, generator=seeded("noise")).to(pixels.device)
    return (pixels + 0.2 * noise).clamp(0, 1)


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise of 0.2": noisy,
    "half the contrast": lambda pixels: 0.5 * pixels,
    "inverted": lambda pixels: 1 - pixels,
}
USUAL, MORE_SCRAPS = "usual", "two more scraps"


def shifted(made: Made) -> dict:
    """Of each shift and row: mean accuracy, and the mean difference from the line, in points.

    All points of a table together, each of its runs a point of the line. `usual` is the range of a
    row's accuracies without shift: beyond that of BASELINE the line is a guess. The interval of the
    difference is over seeds, the runs of a seed taken together; the line is fitted anew to each
    resample.
    """
    found = {row: [] for row in next(iter(made.values()))}
    for row, runs in found.items():
        for jobs in zip(*(of_rows[row] for of_rows in made.values()), strict=True):
            runs.append([accuracies(job) for job in jobs])

    def table_of(row: str, what: str) -> np.ndarray:  # (seeds, points)
        return np.array([[run[what] for run in of_seed] for of_seed in found[row]])

    count = draws(len(found[BASELINE]))
    result = {}
    for shift in (name for name in found[BASELINE][0][0] if name != USUAL):
        slope, height = lines(*(logit(table_of(BASELINE, what)) for what in (USUAL, shift)), count)
        result[shift] = {}
        for row in found:
            usual, under = table_of(row, USUAL), table_of(row, shift)
            expected = 100 / (1 + np.exp(-(slope * logit(usual) + height)))
            away = ((under - expected).mean(axis=2) * count).sum(axis=1) / len(usual)
            result[shift][row] = {
                "mean": float(under.mean()),
                "usual": [float(usual.min()), float(usual.max())],
                "difference": described(widened(away, len(usual))),
            }
    return result


def lines(x: np.ndarray, y: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and height of the least-squares line through (x, y), (seeds, points).

    For each row of count, (resamples, seeds): how often the points of a seed count; the shapes
    of both results are (resamples, 1, 1).
    """
    mean_x, mean_y, mean_xx, mean_xy = (
        count @ table.mean(axis=1) / len(x) for table in (x, y, x * x, x * y)
    )
    spread = mean_xx - mean_x**2
    slope = (mean_xy - mean_x * mean_y) / np.where(spread > 0, spread, np.nan)  # nan: no line
    return slope[:, None, None], (mean_y - slope * mean_x)[:, None, None]


def logit(percent: np.ndarray) -> np.ndarray:
    p = np.clip(percent / 100, 0.01, 0.99)
    return np.log(p / (1 - p))


def accuracies(job: Job) -> dict[str, float]:
    """Test accuracy of a run, in per cent: usual, and under each shift."""
    model, asked = opened(job)
    device = launch.device(asked.device)
    dataset = ensemble.dataset_for(model, asked, device)

    def predict(_, x: Tensor, change: Callable) -> Tensor:
        return model(dataset.normalise(change(to_pixels(x, dataset.normalization))))

    found = {USUAL: 100 * job.correct().mean()}
    for shift, change in SHIFTS.items():
        moved = partial(predict, change=change)
        found[shift] = train.accuracy(moved, model.net, dataset.test, job.settings())
    if asked.data == "digits":
        p, labels, _ = ensemble.probabilities(model, asked.but(scraps=asked.scraps + 2), device)
        found[MORE_SCRAPS] = train.top1(p.argmax(dim=-1), labels)
    return found
