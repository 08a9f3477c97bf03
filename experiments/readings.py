"""Readings of finished runs: averaged probabilities of pairs, and accuracy on shifted images.

A better model is better on shifted images too. So a row is compared with a net from scratch of its
usual accuracy: the line, in logits, through all runs from scratch (Miller et al. 2021).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

import ensemble
import train
from common.augment import seeded, to_pixels
from common.launch import get_device
from experiments.estimates import BASELINE, estimate_over_seeds, jackknife
from experiments.jobs import Job
from experiments.study import Runs, estimate_correct
from teachers.load import Model, open_model

PAIRS = {
    "fine-tuning + distillation": ("fine-tuning", "attention distillation"),
    "fine-tuning + copy": ("fine-tuning", "attention copy"),
    "fine-tuning + from scratch": ("fine-tuning", "from scratch"),
    "fine-tuning twice": ("fine-tuning", "fine-tuning again"),
    "distillation twice": ("attention distillation", "attention distillation again"),
    "from scratch twice": ("from scratch", "from scratch again"),
}
CONTROL = "fine-tuning twice"
AGAINST = {pair: CONTROL for pair in PAIRS if "twice" not in pair}
AGAINST |= {CONTROL: "fine-tuning", "distillation twice": "attention distillation"}


def open_run(job: Job) -> tuple[Model, ensemble.Settings]:
    """A run's model, and the settings of its test images."""
    model = open_model(job.out / "model.pt", get_device("auto"))
    asked = ensemble.Settings(data_dir=job.get_settings().data_dir)
    return model, ensemble.choose_images(model.checkpoint, asked)


# Pairs --------------------------------------------------------------------------------------------


def find_pairs(runs: Runs) -> dict:
    """Estimates of nets and of pairs with averaged probabilities; correlation of a pair's errors.

    The correlation (phi) is that of being wrong on the same images: its mean over seeds, and its
    difference from that of two fine-tuned nets.
    """
    correct = {point: classify_pairs(of_rows) for point, of_rows in runs.items()}
    found = estimate_correct(correct, AGAINST)
    for point, right in correct.items():
        phi = {}
        for name, (one, other) in PAIRS.items():
            nets = zip(right[one], right[other], strict=True)
            phi[name] = np.array([np.corrcoef(*pair)[0, 1] for pair in nets])
        for name, values in phi.items():
            found["points"][point][name]["error_correlation"] = estimate_over_seeds(values) | {
                "difference": estimate_over_seeds(values - phi[CONTROL]) | {"from": CONTROL}
            }
    return found


def classify_pairs(of_rows: dict[str, list[Job]]) -> dict[str, np.ndarray]:
    """Whether each row and pair classified each test image correctly, (seeds, images)."""
    p = {}
    for row, jobs in of_rows.items():
        found = [ensemble.compute_probabilities(*open_run(job)) for job in jobs]
        p[row], labels = torch.stack([p for p, _, _ in found]), found[0][1]
    p |= {pair: (p[one] + p[other]) / 2 for pair, (one, other) in PAIRS.items()}
    return {name: (found.argmax(dim=-1) == labels).numpy() for name, found in p.items()}


# Shift --------------------------------------------------------------------------------------------


def add_noise(pixels: Tensor) -> Tensor:
    noise = torch.randn(pixels.shape, generator=seeded("noise")).to(pixels.device)
    return (pixels + 0.2 * noise).clamp(0, 1)


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise of 0.2": add_noise,
    "half the contrast": lambda pixels: 0.5 * pixels,
    "inverted": lambda pixels: 1 - pixels,
}
USUAL, MORE = "usual", "two more distractors"


def find_shifts(runs: Runs) -> dict:
    """For each shift and row: mean accuracy, and the mean difference from the line, in points.

    Each run is a point of the line, at all points of a table. `usual`: the range of a row's
    accuracies without shift. Beyond that of BASELINE the line is extrapolated.
    """
    found = {row: [] for row in next(iter(runs.values()))}
    for row, of_seeds in found.items():
        for jobs in zip(*(of_rows[row] for of_rows in runs.values()), strict=True):
            of_seeds.append([measure_shifts(job) for job in jobs])

    def tabulate(row: str, what: str) -> np.ndarray:  # (seeds, points)
        return np.array([[run[what] for run in of_seed] for of_seed in found[row]])

    def compute_away(some: np.ndarray, row: str, shift: str) -> float:
        x, y = (logit(tabulate(BASELINE, what)[some]).ravel() for what in (USUAL, shift))
        slope, height = np.polyfit(x, y, 1)
        expected = 100 / (1 + np.exp(-(slope * logit(tabulate(row, USUAL)[some]) + height)))
        return (tabulate(row, shift)[some] - expected).mean()

    def describe(row: str, shift: str) -> dict:
        usual, away = tabulate(row, USUAL), partial(compute_away, row=row, shift=shift)
        return {
            "mean": float(tabulate(row, shift).mean()),
            "usual": [float(usual.min()), float(usual.max())],
            "difference": jackknife(away, len(usual)),
        }

    shifts = list(found[BASELINE][0][0])[1:]  # the first is USUAL
    return {shift: {row: describe(row, shift) for row in found} for shift in shifts}


def logit(percent: np.ndarray) -> np.ndarray:
    p = np.clip(percent / 100, 0.01, 0.99)
    return np.log(p / (1 - p))


def measure_shifts(job: Job) -> dict[str, float]:
    """Test accuracy of a run, in per cent: usual, and under each shift."""
    model, asked = open_run(job)
    dataset = ensemble.load_images(model, asked)

    def predict(_, x: Tensor, change: Callable) -> Tensor:
        return model(dataset.normalise(change(to_pixels(x, dataset.normalization))))

    found = {USUAL: 100 * job.read_correct().mean()}
    for shift, change in SHIFTS.items():
        changed = partial(predict, change=change)
        tested = train.classify(changed, model.net, dataset.test, job.get_settings().amp)
        found[shift] = train.compute_top1(*tested)
    if asked.data == "digits":
        harder = replace(asked, distractors=asked.distractors + 2)
        p, labels, _ = ensemble.compute_probabilities(model, harder)
        found[MORE] = train.compute_top1(p.argmax(dim=-1), labels)
    return found
