"""The study: every table, each with one command.

    python -m experiments.reproduce TABLE [TABLE ...] [--seeds 10]
    python -m experiments.reproduce related        all whose names begin with it

Writes results/TABLE.json, and a picture of it. Killed at any moment, the same
command goes on where it was; runs that several tables share are made once. What
was expected of each before it was run, and what was found: experiments/LOG.md.
"""

import launch

import json
import textwrap
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

import pictures
import storage
from experiments import figures, related_tables, rows, tables, tune
from experiments.jobs import ROOT, Made, Runner
from experiments.nearest import nearest
from experiments.report import means, read, shown
from experiments.rows import Flags, Runs, Study
from experiments.tables import AXES, BASE, CLUTTER, DIGITS, Table, accuracies
from settings import Setting, Settings, parse_settings

TABLES = tables.TABLES | related_tables.TABLES
SETTINGS = {
    "seeds": Setting(0, "runs of each row, each with a seed of its own (0: the table's)", low=1),
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
        record = read(ROOT / "results" / f"{name}.json")
    except FileNotFoundError:
        return "not recorded yet"
    except ValueError as error:
        return str(error)
    seeds = f"seeds: {len(record['seeds'])}; " if "seeds" in record else ""
    return (
        f"{seeds}runs: {record['runs']}, {record['training_minutes']:.0f} min on {record['device']}"
    )


def listed(name: str, table: Table) -> str:
    lines = (
        textwrap.wrap(text, 72, initial_indent="    ", subsequent_indent="    ")
        for text in (table.about, cost(name))
    )
    return "\n".join([f"  {name}", *(line for some in lines for line in some)])


LIST = "\n" + "\n".join(listed(name, table) for name, table in TABLES.items())
parse = partial(
    parse_settings, __doc__ + LIST, SETTINGS, positional=("tables", "one table or several")
)


# A table ------------------------------------------------------------------------------------------


def train(table: Table, settings: Settings, runner: Runner, seeds: list[int]) -> Made:
    """The finished runs of a table, those trained now that are not there yet."""
    runs, tuned = runs_of(table.study, settings), tuning(table.study, settings)
    if table.study is DIGITS and set(CLUTTER) <= tuned.keys() and simplest(tuned) != BASE:
        raise ValueError(
            f"by the rule the base task is {simplest(tuned)}, not {BASE}: change the default of "
            "--scraps in settings.py"
        )
    jobs, made = {}, {}
    for point, flags in table.points.items():
        made[point] = {row: [] for row in table.rows if row in table.study.rows}
        settled = table.tuned_at or point
        own = tune.chosen(tuned.get(settled, {}))
        check(own, settled, table.study, (*made[point], *nets_of(made[point], table.study)))
        for row in made[point]:
            for seed in seeds:
                needed = runs.jobs(row, seed, flags, own)
                made[point][row].append(list(needed.values())[-1])
                for name, job in needed.items():
                    if jobs.setdefault(name, job) != job:  # one would be taken for the other
                        raise ValueError(f"two different runs are called '{name}'")
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
    study = table.study
    trained = [row for row in table.rows if row in study.rows]
    known = tuning(study, settings)
    others = [row for row in nets_of(trained, study) if row not in trained]
    for point in table.points:
        check(tune.chosen(known.get(point, {})), point, study, others)
    runs = runs_of(study, settings)
    found = tune.tune(runs, runner, trained, table.points, known)
    if rows.NEAREST in table.rows:
        for point, flags in table.points.items():
            best, scores = tune.chosen(found[point]), []
            for seed in study.seeds:
                *_, scratch = runs.jobs("from scratch", seed, flags, best).values()
                scores.append(100 * nearest(scratch.settings(), "val").mean())
            found[point][rows.NEAREST] = tune.shown({}, {(): scores})
    return found


def simplest(points: tune.Tuned) -> str:
    """The base task: the least clutter in which what needs no transfer stays below fine-tuning.

    By 2 points, on validation images; `points` are those of digits-tuning. The last if none does.
    """

    def best(of_row: dict) -> float:
        return max(np.mean(trial["validation"]) for trial in of_row["tried"])

    for point in CLUTTER:
        of_rows = points[point]
        others = [best(of_rows[row]) for row in (*rows.PROBE, rows.NEAREST)]
        if max(others) + 2 <= best(of_rows["fine-tuning"]):
            return point
    return list(CLUTTER)[-1]


def tuning(study: Study, settings: Settings) -> tune.Tuned:
    """What all tunings of a study found so far: point: row: what was chosen."""
    found = {}
    for name, table in TABLES.items():
        path = Path(settings.results) / f"{name}.json"
        if table.tunes and table.study is study and path.exists():
            for point, of_rows in read(path)["points"].items():
                found[point] = found.get(point, {}) | of_rows
    return found


def check(found: dict[str, Flags], point: str, study: Study, needed: Iterable[str]) -> None:
    """ValueError unless the settings of these rows were found, in a study that tunes any."""
    for row in needed if study.own else ():
        source = row if row in study.own else study.rows[row].tuned_as
        if source not in found:
            first = next(
                name
                for name, table in TABLES.items()
                if table.tunes and table.study is study and source in table.rows
            )
            raise ValueError(f"'{source}' has no settings yet at {point}: first reproduce {first}")


def nets_of(asked: Iterable[str], study: Study) -> list[str]:
    """The rows whose nets others need."""
    teachers = (study.rows[row].teacher for row in asked)
    return [teacher for teacher in teachers if teacher in study.rows]


@launch.sigterm_as_exit()  # which stops the runs as well
def main(settings: Settings) -> None:
    launch.one_process()
    names = [found for name in settings.tables for found in named(name)]
    results = Path(settings.results)
    results.mkdir(parents=True, exist_ok=True)
    for name in names:
        table = TABLES[name]
        runner = Runner(settings.jobs, settings.minutes, "val_top1" if table.tunes else "test_top1")
        if table.tunes:
            found = {"points": tuned(table, settings, runner)}
            seeds, measure = list(table.study.seeds), "validation top-1, %"
        else:
            count, measure = settings.seeds or table.seeds, "test top-1, %"
            seeds = list(range(table.first, table.first + count))
            made = train(table, settings, runner, seeds)
            found = (table.find or accuracies)(table, made)
        found = {"seeds": seeds, "measure": measure} | found
        path = results / f"{name}.json"
        record = runner.record(name, settings.extra, found)
        storage.write_text(path, json.dumps(record, indent=1) + "\n")
        show(name, found)
        draw(table, found["points"], results, path)
        print(f"\nwrote {path}")


def named(name: str) -> list[str]:
    """A table, or all whose names begin with a word."""
    found = (
        [name] if name in TABLES else [other for other in TABLES if other.startswith(name + "-")]
    )
    if not found:
        raise ValueError(f"no table '{name}': choose from {', '.join(TABLES)}")
    return found


def draw(table: Table, points: dict, results: Path, path: Path) -> None:
    """A picture of a table's accuracies, and the one of recovery along all axes known so far."""
    if table.tunes or table.find:
        return
    pictures.save(figures.accuracies(points), path.with_suffix(".png"))
    records = {title: results / f"{name}.json" for title, name in AXES.items()}
    known = {title: read(record)["points"] for title, record in records.items() if record.exists()}
    if path in records.values():
        pictures.save(figures.recovery(known), results / "recovery.png")


def show(name: str, found: dict) -> None:
    """The figures of a record, a line for each row."""
    for point, of_rows in found["points"].items():
        print(f"\n{name}, {point}: {found['measure']}, seeds: {len(found['seeds'])}")
        for row, cells in of_rows.items():
            print(f"  {row:<32} {summary(cells)}")
    for name, cell in found.get("contrasts", {}).items():
        print(f"{name}: {shown(cell, '+.2f')}")


def summary(cells: dict) -> str:
    if "chosen" in cells:
        return ", ".join(f"{name} {value}" for name, value in cells["chosen"].items())
    if "mean" not in cells:  # lists over layers
        return "; ".join(f"{what} {means(cell)}" for what, cell in cells.items())
    parts = (
        shown(cells, ".1f"),
        shown(cells.get("difference"), "+.1f"),
        shown(cells.get("recovery"), ".2f"),
    )
    return "  ".join(parts)


if __name__ == "__main__":
    launch.run(main, parse)
