"""The study: every table, each with one command.

    python -m experiments.reproduce TABLE [TABLE ...] [--seeds 10]

Writes results/TABLE.json. Killed at any moment, the same command goes on where
it was; runs that several tables share are made once. What was expected of each
before it was run, and what was found: experiments/LOG.md. The tables:
"""

import launch

import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import storage
from experiments import rows, tune
from experiments.estimates import estimates
from experiments.jobs import ROOT, Runner
from experiments.nearest import nearest
from experiments.rows import MAIN, Flags, Runs, Study
from settings import Setting, Settings, parse_settings

DIGITS = Study(
    base={"data": "digits", "num_labels": 100, "epochs": 450},
    teacher={},
    images=("data", "scraps"),
    own_teachers=True,
    seeds=(100, 101),
    rates=(2e-3, 4e-3, 8e-3),
    decays=(0.05, 0.2, 0.5, 1.5),
)


class Table(NamedTuple):
    """Rows at points of a study."""

    about: str
    study: Study
    rows: tuple[str, ...]
    points: dict[str, Flags]
    tunes: bool = False  # finds settings on validation images, instead of testing
    tuned_at: str = ""  # the point whose settings all points take (empty: each its own)
    against: dict[str, str] = {}  # what a row is compared with, where not with from scratch


SCRAPS = 2  # TODO
CLUTTER = {f"{n} scraps": {"scraps": n} for n in (0, 1, 2)}
BASE = f"{SCRAPS} scraps"
AT_BASE = {BASE: CLUTTER[BASE]}
STEPS = {50: 900, 100: 450, 300: 150, 997: 47}  # labels: epochs of about 900 steps
LABELS = {
    f"{labels} labels": CLUTTER[BASE] | {"num_labels": labels, "epochs": epochs}
    for labels, epochs in STEPS.items()
}
LENGTHS = {f"{epochs} epochs": CLUTTER[BASE] | {"epochs": epochs} for epochs in (150, 450, 1350)}
ENDS = ("from scratch", "fine-tuning")  # between which recovery is measured
TRANSFER = ("attention copy", "attention distillation")
at_base = partial(Table, study=DIGITS, points=AT_BASE)
TABLES = {
    "digits-tuning": Table(
        "settings of the main rows for 0, 1 and 2 scraps", DIGITS, tuple(MAIN), CLUTTER, tunes=True
    ),
    "digits-clutter": Table("the main rows for 0, 1 and 2 scraps", DIGITS, tuple(MAIN), CLUTTER),
    "digits-labels": Table(
        "the main rows for 50 to 997 labels, at equal steps", DIGITS, tuple(MAIN), LABELS,
        tuned_at=BASE,
    ),
    "digits-length": Table(
        "the main rows for 150, 450 and 1,350 epochs", DIGITS, tuple(MAIN), LENGTHS, tuned_at=BASE
    ),
    "digits-tuning-others": at_base(
        "settings of baselines and controls", rows=tuple(rows.OTHERS), tunes=True
    ),
    "digits": at_base(
        "main rows, baselines and controls", rows=(*MAIN, *rows.OTHERS, rows.NEAREST)
    ),
    "digits-maps": at_base(
        "other maps, copied and distilled: uniform to fine-tuned", rows=(*MAIN, *rows.LADDER)
    ),
    "digits-parts": at_base("q, k, v or several copied", rows=(*MAIN, *rows.PARTS)),
    "digits-layers": at_base("which layers are copied or distilled", rows=(*MAIN, *rows.LAYERS)),
    "digits-explained": at_base(
        "distillation detached; without labels, then a probe",
        rows=(*MAIN, "linear probe of the teacher", *rows.EXPLAINED),
        against={"distillation, detached": "attention distillation",
                 "linear probe of that": "linear probe of the teacher"},
    ),
}  # fmt: skip
SETTINGS = {
    "seeds": Setting(10, "runs of each row, with seeds 0, 1, ...", low=1),
    "jobs": Setting(0, "runs at a time (0: one per CPU core, or one on a GPU)"),
    "minutes": Setting(0.0, "stop after so long; the same command goes on (0: no limit)"),
    "data_dir": Setting("", "where the images of cifar10 are"),
    "runs": Setting("runs/reproduce", "where the runs go"),
    "results": Setting("results", "where the records go, and where settings found by tuning are"),
    "extra": Setting("", "more arguments for every training, such as '--device cpu'"),
}


def cost(name: str) -> str:
    """What a table took when it was recorded."""
    try:
        record = json.loads((ROOT / "results" / f"{name}.json").read_text())
    except OSError:
        return "not recorded yet"
    seeds = f"{len(record['seeds'])} seeds, " if "seeds" in record else ""
    return (
        f"{seeds}{record['runs']} runs, {record['training_minutes']:.0f} min on {record['device']}"
    )


LIST = "".join(
    f"\n  {name:<21} {table.about}\n{' ' * 25}{cost(name)}" for name, table in TABLES.items()
)
parse = partial(
    parse_settings, __doc__ + LIST, SETTINGS, positional=("tables", "one table or several")
)


# A table ------------------------------------------------------------------------------------------


def test(name: str, settings: Settings, runner: Runner) -> dict:
    """Trains and tests the rows of a table at all its points."""
    table, seeds = TABLES[name], range(settings.seeds)
    runs, tuned = runs_of(table.study, settings), tuning(table.study, settings)
    jobs, names = {}, {}
    for point, flags in table.points.items():
        own = settled(tuned, table.tuned_at or point, table.rows)
        for row in table.rows:
            if row == rows.NEAREST:
                continue
            made = [runs.jobs(row, seed, flags, own) for seed in seeds]
            names[point, row] = [list(some)[-1] for some in made]
            jobs |= {name: job for some in made for name, job in some.items()}
    runner.run(jobs)
    points = {}
    for point, flags in table.points.items():
        correct = {}
        for row in table.rows:
            if row == rows.NEAREST:
                asked = table.study.base | flags
                correct[row] = np.stack([nearest(asked, seed) for seed in seeds])
            else:
                correct[row] = np.stack([jobs[job].correct() for job in names[point, row]])
        images = correct[table.rows[0]].shape[1]
        points[point] = estimates(correct, samples(table.study, images), table.against)
    return {"seeds": list(seeds), "measure": "test top-1, %, with 95 % intervals", "points": points}


def samples(study: Study, images: int) -> np.ndarray:
    """Of each test image the sample that it belongs to: a digit lies in four places."""
    return np.arange(images) % (500 if study.base["data"] == "digits" else images)


def runs_of(study: Study, settings: Settings) -> Runs:
    extra = settings.extra.split()
    if study.base["data"] != "digits" and settings.data_dir:
        extra += ["--data-dir", settings.data_dir]
    return Runs(study, Path(settings.runs) / study.base["data"], extra)


# Tuning -------------------------------------------------------------------------------------------


def tuning(study: Study, settings: Settings) -> tune.Tuned:
    """What all tunings of a study found so far: point: row: what was chosen."""
    found = {}
    for name, table in TABLES.items():
        path = Path(settings.results) / f"{name}.json"
        if table.tunes and table.study is study and path.exists():
            for point, of_rows in json.loads(path.read_text())["points"].items():
                found[point] = found.get(point, {}) | of_rows
    return found


def settled(tuned: tune.Tuned, point: str, asked: tuple[str, ...]) -> dict[str, Flags]:
    """The settings of rows at a point. ValueError if they were not tuned yet."""
    found = tune.chosen(tuned.get(point, {}))
    sources = {row: rows.ROWS[row] for row in asked if row in rows.ROWS}
    for row, made in sources.items():
        if (made.tuned_as or row) not in found:
            needed = next(
                name
                for name, table in TABLES.items()
                if table.tunes and point in table.points and (made.tuned_as or row) in table.rows
            )
            raise ValueError(f"'{row}' has no settings yet at {point}: first reproduce {needed}")
    return found


def main(settings: Settings) -> None:
    launch.one_process()
    for name in settings.tables:
        if name not in TABLES:
            raise ValueError(f"no table '{name}': choose of {', '.join(TABLES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which stops the runs as well
    results = Path(settings.results)
    results.mkdir(parents=True, exist_ok=True)
    for name in settings.tables:
        table = TABLES[name]
        runner = Runner(settings.jobs, settings.minutes, "val_top1" if table.tunes else "test_top1")
        if table.tunes:
            study = table.study
            known = tuning(study, settings)
            points = tune.tune(runs_of(study, settings), runner, table.rows, table.points, known)
            found = {"seeds": list(study.seeds), "measure": "validation top-1, %", "points": points}
        else:
            found = test(name, settings, runner)
        path = results / f"{name}.json"
        storage.write_text(path, json.dumps(runner.record(name, found), indent=1) + "\n")
        show(name, found)
        print(f"\nwrote {path}")


def show(name: str, found: dict) -> None:
    for point, of_rows in found["points"].items():
        print(f"\n{name}, {point}: {found['measure']}, {len(found['seeds'])} seeds")
        for row, cells in of_rows.items():
            print(f"  {row:<32} {cells['chosen'] if 'chosen' in cells else summary(cells)}")


def summary(cells: dict) -> str:
    def shown(cell: dict | None, form: str) -> str:
        if not cell:
            return ""
        between = cell["interval"]
        middle = format(cell["mean"], form)
        return middle + (f" [{between[0]:{form}}, {between[1]:{form}}]" if between else "")

    parts = (
        ("", cells, ".1f"),
        ("", cells.get("difference"), "+.1f"),
        ("r ", cells.get("recovery"), ".2f"),
    )
    return "  ".join(label + shown(cell, form) for label, cell, form in parts if cell)


if __name__ == "__main__":
    launch.run(main, parse)
