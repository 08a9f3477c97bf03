"""Ensembles of finished runs, with their controls: is it the method, or only a second net?"""

import launch

import numpy as np

import checkpoints
import ensemble
from checkpoints import Model
from experiments.estimates import estimates, over_seeds
from experiments.jobs import Job, Made
from settings import Settings

TEAMS = {
    "fine-tuning + distillation": ("fine-tuning", "attention distillation"),
    "fine-tuning + copy": ("fine-tuning", "attention copy"),
    "fine-tuning + from scratch": ("fine-tuning", "from scratch"),
    "fine-tuning twice": ("fine-tuning", "fine-tuning again"),
    "distillation twice": ("attention distillation", "attention distillation again"),
    "from scratch twice": ("from scratch", "from scratch again"),
}
ALIKE = "fine-tuning twice"
AGAINST = {team: ALIKE for team in TEAMS if "twice" not in team}
AGAINST |= {ALIKE: "fine-tuning", "distillation twice": "attention distillation"}


def teams(made: Made, groups: np.ndarray) -> dict:
    """Estimates of the members and of their averaged probabilities; correlation of their errors.

    The correlation (phi) is that of being wrong on the same images: its mean over seeds, and how
    far it is from that of two fine-tuned nets.
    """
    correct = {point: classified(of_rows) for point, of_rows in made.items()}
    points = estimates(correct, groups, AGAINST)["points"]
    for point, right in correct.items():
        phi = {
            team: np.array([np.corrcoef(*pair)[0, 1] for pair in zip(*of, strict=True)])
            for team, of in ((team, [right[row] for row in pair]) for team, pair in TEAMS.items())
        }
        for team, found in phi.items():
            points[point][team]["error_correlation"] = over_seeds(found) | {
                "difference": over_seeds(found - phi[ALIKE]) | {"from": ALIKE}
            }
    return points


def classified(of_rows: dict[str, list[Job]]) -> dict[str, np.ndarray]:
    """Of each row and team whether it classified each test image rightly, (seeds, images)."""
    found = {row: [seen(job) for job in jobs] for row, jobs in of_rows.items()}
    p = {row: np.stack([of_job for of_job, _ in of_row]) for row, of_row in found.items()}
    (_, labels), *_ = next(iter(found.values()))
    p |= {team: (p[one] + p[other]) / 2 for team, (one, other) in TEAMS.items()}
    return {name: found.argmax(axis=-1) == labels for name, found in p.items()}


def seen(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """What a run's model makes of the test images: probabilities (images, classes), and labels."""
    model, asked = opened(job)
    p, labels, _ = ensemble.probabilities(model, asked, launch.device(asked.device))
    return p.numpy(), labels.numpy()


def opened(job: Job) -> tuple[Model, Settings]:
    """A run's model, and the settings of its test images."""
    path = str(job.out / "model.pt")
    asked = ensemble.parse([path]).but(data_dir=job.settings().data_dir)
    model = checkpoints.open_model(path, launch.device(asked.device))
    return model, model.checkpoint.images(asked)
