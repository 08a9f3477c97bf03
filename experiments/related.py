"""The tables of the related systems: their scripts with one thing changed each."""

from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import storage
from experiments import rows
from experiments.estimates import estimates, over_seeds
from experiments.jobs import SCRIPTS, Job, Made
from experiments.tables import AT_BASE, DIGITS, Table, accuracies

STUDY = DIGITS._replace(base={"data": "digits"}, own={})  # settings as the scripts have them


def sized(table: Table, made: Made) -> dict:
    """As `accuracies`; and of each row what of it is trained, and what an image costs it."""
    found = accuracies(table, made)
    for point, of_rows in made.items():
        for row, (job, *_) in of_rows.items():
            found["points"][point][row] |= size_of(job)
    return found


@torch.no_grad()
def size_of(job: Job) -> dict[str, int]:
    task = SCRIPTS[job.script].task(job.settings())
    trained = sum(p.numel() for p in task.net.parameters() if p.requires_grad)
    image, _ = next(task.data.test.in_order(1))
    with FlopCounterMode(display=False) as counter:
        task.predict(task.net.eval(), image)
    return {"trained parameters": trained, "multiply-adds": counter.get_total_flops() // 2}


def reminded(table: Table, made: Made) -> dict:
    """As `accuracies`, compared with the first row; which of its failures are avoided.

    And how often attention lands where it should.
    """
    ((point, of_rows),) = made.items()
    correct = {row: np.stack([job.correct() for job in jobs]) for row, jobs in of_rows.items()}
    alone = table.rows[0]
    each = np.arange(correct[alone].shape[1])  # scene is a sample of its own
    found = estimates({point: correct}, each, dict.fromkeys(correct, alone))
    for row, cells in found["points"][point].items():
        pairs = zip(correct[row], correct[alone], strict=True)
        cells["failures avoided"] = percent([now[~before].mean() for now, before in pairs])
        tests = [storage.read(job.out / "test.pt") for job in of_rows[row]]
        if all("looked" in test for test in tests):
            lands = [(t["looked"] == t["labels"]).double().mean() for t in tests]
            cells["attention lands right"] = percent(lands)
    return found


def percent(of_seeds: list) -> dict:
    return over_seeds(100 * np.array(of_seeds))


related = partial(Table, study=STUDY, points=AT_BASE, seeds=5)
TABLES = {
    "related-activations": related(
        "where a CNN is active, and its softened classes, given to smaller ones",
        rows=tuple(rows.ACTIVATIONS), find=sized,
        against=dict.fromkeys(rows.ACTIVATIONS, "small")
        | {f"{model}, AT": model for model in ("grouped", "bottleneck")},
    ),
    "related-hints": related(
        "what contributed to a teacher's class, laid over images", rows=tuple(rows.HINTS),
        against=dict.fromkeys(rows.HINTS, "no hints")
        | {"KD and IG": "KD", "KD, AT and IG": "KD and IG"},
    ),
    "related-linear": related(
        "softmax attention made linear", rows=tuple(rows.LINEAR), find=sized,
        against=dict.fromkeys(rows.LINEAR, rows.SOFTMAX),
    ),
    "related-attndistill": related(
        "without labels: class tokens and where they look; 20 nearest neighbours",
        rows=tuple(rows.ATTNDISTILL),
        against=dict.fromkeys(rows.ATTNDISTILL, "DINO, student")
        | {row: row.replace(" and map", "") for row in rows.ATTNDISTILL if "map" in row},
    ),
    "related-reminders": related(
        "reminders in words, to where a robot looks", rows=tuple(rows.REMINDED), points={"": {}},
        find=reminded,
    ),
}  # fmt: skip
