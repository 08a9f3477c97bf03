"""The tables of the related systems: their scripts with one thing changed each."""

from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import storage
from experiments import rows
from experiments.estimates import estimates, over_seeds
from experiments.jobs import SCRIPTS, Made
from experiments.tables import AT_BASE, DIGITS, Table, accuracies, classified

STUDY = DIGITS._replace(base={"data": "digits"}, own={})  # settings as the scripts have them


def sized(table: Table, made: Made) -> dict:
    """As `accuracies`; and of each row its parameters, and the multiply-adds of an image."""
    found = accuracies(table, made)
    for point, of_rows in made.items():
        for row, (job, *_) in of_rows.items():
            task = SCRIPTS[job.script].task(job.settings())
            image, _ = next(task.data.test.in_order(1))
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                task.predict(task.net.eval(), image)
            cells = found["points"][point][row]
            cells["parameters"] = sum(p.numel() for p in task.net.parameters())
            cells["multiply-adds"] = counter.get_total_flops() // 2
    return found


def linear(table: Table, made: Made) -> dict:
    """As `accuracies`; and how many parameters each row trained, beside those of the ViT."""
    found = accuracies(table, made)
    for point, of_rows in made.items():
        cells = found["points"][point]
        for row, (job, *_) in of_rows.items():
            settings = job.settings()
            net = SCRIPTS[job.script].task(settings).net
            trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
            before = cells.get(rows.ROWS[row].teacher, {}) if settings.lr else {}
            own = row != rows.SOFTMAX and bool(settings.lr)
            cells[row]["trained parameters"] = own * trained + before.get("trained parameters", 0)
    return found


def reminded(table: Table, made: Made) -> dict:
    """As `accuracies`, compared with the first row; which of its failures are avoided.

    And how often attention lands where it should.
    """
    ((point, of_rows),) = made.items()
    correct = classified(table, of_rows)
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


related = partial(Table, study=STUDY, points=AT_BASE, seeds=5, first=1)  # 0: used in writing
TABLES = {
    "related-activations": related(
        "where a CNN is active, and its softened classes, given to smaller ones",
        rows=tuple(rows.ACTIVATIONS), find=sized,
        against={row: row.split(",")[0] for row in rows.ACTIVATIONS if "," in row},
    ),
    "related-gradients": related(
        "what contributed to a teacher's class, laid over images", rows=tuple(rows.GRADIENTS),
        against=dict.fromkeys(rows.GRADIENTS, "neither")
        | {"KD and IG": "KD", "KD, AT and IG": "KD and IG"},
    ),
    "related-linear": related(
        "softmax attention made linear", rows=tuple(rows.LINEAR), find=linear,
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
