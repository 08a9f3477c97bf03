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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import storage
from experiments import rows, tune
from experiments.estimates import estimates
from experiments.jobs import ROOT, Job, Runner
from experiments.looks import looks
from experiments.nearest import nearest
from experiments.rows import MAIN, Flags, Runs, Study
from experiments.shift import shifted
from experiments.teams import teams
from settings import IMAGES, Setting, Settings, parse_settings

DIGITS = Study(
    base={"data": "digits", "num_labels": 100, "epochs": 450},
    teacher={},
    images=("data", "scraps"),
    own_teachers=True,
    seeds=(100, 101),
    rates=(2e-3, 4e-3, 8e-3),
    decays=(0.05, 0.2, 0.5, 1.5),
)


Made = dict[str, dict[str, list[Job]]]  # point: row: its runs, one for each seed


class Table(NamedTuple):
    """Rows at points of a study."""

    about: str
    study: Study
    rows: tuple[str, ...]
    points: dict[str, Flags]
    tunes: bool = False  # finds settings on validation images, instead of testing
    tuned_at: str = ""  # the point whose settings all points take (empty: each its own)
    against: dict[str, str] | None = None  # what a row is compared with, where not with BASELINE
    find: Callable[["Table", Made], dict] | None = None  # something else than accuracies


def samples(table: Table, made: Made) -> np.ndarray:
    """Of each test image the sample that it belongs to: a digit lies in four places."""
    images = len(next(iter(next(iter(made.values())).values()))[0].correct())
    return np.arange(images) % (500 if table.study.base["data"] == "digits" else images)


def accuracies(table: Table, made: Made) -> dict:
    """Of each point the estimates of its rows."""
    points = {}
    for point, of_rows in made.items():
        correct = {row: np.stack([job.correct() for job in jobs]) for row, jobs in of_rows.items()}
        if rows.NEAREST in table.rows:
            seeds = range(len(next(iter(of_rows.values()))))
            flags = table.study.base | table.points[point]
            correct[rows.NEAREST] = np.stack([nearest(flags, seed) for seed in seeds])
        points[point] = estimates(correct, samples(table, made), table.against)
    return points


CLUTTER = {f"{n} scraps": {"scraps": n} for n in (0, 1, 2)}
BASE = f"{IMAGES['scraps'].default} scraps"  # see `simplest`
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
        "settings of the main rows for 0, 1 and 2 scraps; and which of these is the base task",
        DIGITS, (*MAIN, *rows.PROBE, rows.NEAREST), CLUTTER, tunes=True,
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
    "digits-main": at_base(
        "main rows, baselines and controls", rows=(*MAIN, *rows.PROBE, *rows.OTHERS, rows.NEAREST)
    ),
    "digits-maps": at_base(
        "other maps, copied and distilled: uniform to fine-tuned", rows=(*MAIN, *rows.LADDER)
    ),
    "digits-parts": at_base("q, k, v or several copied", rows=(*MAIN, *rows.PARTS)),
    "digits-layers": at_base("which layers are copied or distilled", rows=(*MAIN, *rows.LAYERS)),
    "digits-explained": at_base(
        "distillation detached; without labels, then a probe",
        rows=(*MAIN, *rows.PROBE, *rows.EXPLAINED),
        against={"distillation, detached": "attention distillation",
                 "linear probe of that": "linear probe of the teacher"},
    ),
    "digits-looks": at_base(
        "where rows and teachers look; how like the teacher's are maps and features",
        rows=tuple(MAIN), find=lambda _, made: looks(made),
    ),
    "digits-ensembles": at_base(
        "pairs of nets and their controls; do they err together?", rows=(*MAIN, *rows.AGAIN),
        find=lambda table, made: teams(made, samples(table, made)),
    ),
    "digits-shift": Table(
        "noise, contrast, more clutter, at matched accuracy", DIGITS, tuple(MAIN), LENGTHS,
        tuned_at=BASE, find=lambda _, made: shifted(made),
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


def train(table: Table, settings: Settings, runner: Runner) -> Made:
    """The finished runs of a table, those trained now that are not there yet."""
    runs, tuned = runs_of(table.study, settings), tuning(table.study, settings)
    jobs, made = {}, {}
    for point, flags in table.points.items():
        own = settled(tuned, table.tuned_at or point, table.rows)
        made[point] = {row: [] for row in table.rows if row in rows.ROWS}
        for row in made[point]:
            for seed in range(settings.seeds):
                needed = runs.jobs(row, seed, flags, own)
                made[point][row].append(needed[list(needed)[-1]])
                jobs |= needed
    runner.run(jobs)
    return made


def runs_of(study: Study, settings: Settings) -> Runs:
    extra = tuple(settings.extra.split())
    if study.base["data"] != "digits" and settings.data_dir:
        extra += ("--data-dir", settings.data_dir)
    return Runs(study, Path(settings.runs) / study.base["data"], extra)


# Tuning -------------------------------------------------------------------------------------------


def tuned(table: Table, settings: Settings, runner: Runner) -> tune.Tuned:
    """Settings for the rows of a table at all its points, and what was tried."""
    study, trained = table.study, [row for row in table.rows if row in rows.ROWS]
    known = tuning(study, settings)
    found = tune.tune(runs_of(study, settings), runner, trained, table.points, known)
    if rows.NEAREST in table.rows:
        for point, flags in table.points.items():
            asked = study.base | flags
            scores = [100 * nearest(asked, seed, "val").mean() for seed in study.seeds]
            found[point][rows.NEAREST] = tune.shown({}, {(): scores})
    return found


def simplest(points: tune.Tuned) -> str:
    """The base task: the least clutter in which what needs no transfer stays below fine-tuning.

    By 2 points, on validation images; `points` are those of digits-tuning.
    """

    def best(of_row: dict) -> float:
        return max(np.mean(trial["validation"]) for trial in of_row["tried"])

    for point, of_rows in points.items():
        others = [best(of_rows[row]) for row in (*rows.PROBE, rows.NEAREST)]
        if max(others) + 2 <= best(of_rows["fine-tuning"]):
            return point
    return "none"


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
            points = tuned(table, settings, runner)
            seeds, measure = list(table.study.seeds), "validation top-1, %"
            found = {"seeds": seeds, "measure": measure, "points": points}
        else:
            made = train(table, settings, runner)
            points = (table.find or accuracies)(table, made)
            measure = "test top-1, %, with 95 % intervals"
            found = {"seeds": list(range(settings.seeds)), "measure": measure, "points": points}
        path = results / f"{name}.json"
        storage.write_text(path, json.dumps(runner.record(name, found), indent=1) + "\n")
        show(name, found)
        print(f"\nwrote {path}")


def show(name: str, found: dict) -> None:
    """The figures of a record, a line for each row."""
    for point, of_rows in found["points"].items():
        print(f"\n{name}, {point}: {found['measure']}, {len(found['seeds'])} seeds")
        for row, cells in of_rows.items():
            print(f"  {row:<32} {summary(cells)}")


def summary(cells: dict) -> str:
    if "chosen" in cells:
        return ", ".join(f"{name} {value}" for name, value in cells["chosen"].items())
    if "mean" not in cells:  # lists over layers
        return "; ".join(f"{what} {' '.join(f'{x:.2f}' for x in xs)}" for what, xs in cells.items())
    parts = (
        shown(cells, ".1f"),
        shown(cells.get("difference"), "+.1f"),
        shown(cells.get("recovery"), ".2f"),
    )
    return "  ".join(parts)


def shown(cell: dict | None, form: str) -> str:
    """A figure and its interval."""
    if not cell:
        return ""
    between = cell.get("interval")
    ends = f" [{between[0]:{form}}, {between[1]:{form}}]" if between else ""
    return format(cell["mean"], form) + ends


if __name__ == "__main__":
    launch.run(main, parse)
