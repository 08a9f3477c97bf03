"""Pairs of finished runs: averaged probabilities, and whether they err on the same images."""

import numpy as np
import torch

import ensemble
from common.launch import get_device
from experiments.estimates import estimate_over_seeds
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
