"""The study: every table, each with one command.

    python -m experiments.reproduce TABLE [TABLE ...] [--seeds 10]
    python -m experiments.reproduce related        all whose names begin with it

Writes results/TABLE.json and a picture of it. Killed at any moment, the same
command resumes. Runs that several tables share are made once. What was expected
of each table before it was run, and what was found: experiments/LOG.md.
"""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import checkpoints, launch, pictures
from common.settings import parse_settings, setting
from experiments import figures, related_tables, tables, tune
from experiments.estimates import format_cell, format_means
from experiments.jobs import ROOT, Runner, read_record
from experiments.study import Planner, Runs, RunSettings, Table, estimate_accuracies, make_planner
from teachers.find import find_bundled

TABLES = tables.TABLES | related_tables.TABLES


@dataclass(frozen=True)
class Settings(RunSettings):
    tables: tuple[str, ...] = ()
    seeds: int = setting(0, "runs of each row, each with its own seed [the table's]", low=1)
    results: str = setting("results", "folder of the records, those of tuning too")


def parse(argv: Sequence[str]) -> Settings:
    doc = __doc__ + list_tables() if {"--help", "-h"} & set(argv) else __doc__
    return parse_settings(doc, Settings, {}, argv, ("tables", "one table or several", 0))


def list_tables() -> str:
    how = dict(width=72, initial_indent="    ", subsequent_indent="    ")
    how |= dict(break_on_hyphens=False, break_long_words=False)  # paths can be copied
    lines = []
    for name, table in TABLES.items():
        lines += ["", f"  {name}", *textwrap.wrap(table.about, **how)]
        lines += textwrap.wrap(describe_cost(ROOT / "results" / f"{name}.json"), **how)
    return "\n".join(lines)


def describe_cost(path: Path) -> str:
    """What a table took when it was recorded."""
    if not path.exists():
        return "not recorded yet"
    try:
        record = read_record(path)
    except ValueError as error:
        return str(error)
    cost = f"{record['runs']}, {record['training_minutes']:.0f} min on {record['device']}"
    return f"seeds: {len(record['seeds'])}; runs: {cost}"


def train(table: Table, planner: Planner, tuned: tune.Tuned, runner: Runner, seeds) -> Runs:
    """The finished runs of a table. Those that are missing are trained now."""
    jobs, found = {}, {}
    for point, flags in table.points.items():
        rows, count = table.fewer.get(point, (table.rows, len(seeds)))
        found[point] = {row: [] for row in rows if row in table.study.rows}
        own = tune.get_chosen(tuned.get(table.tuned_at, {}) | tuned.get(point, {}))
        needed = [*found[point], *tune.list_teachers(found[point], table.study)]
        tune.check_tuned(own, table.study, needed, TABLES)
        for row in found[point]:
            for seed in seeds[:count]:
                planned = planner.plan(row, seed, flags, own)
                found[point][row].append(list(planned.values())[-1])
                for name, job in planned.items():
                    if jobs.setdefault(name, job) != job:  # one would be taken for the other
                        raise ValueError(f"two different runs are called '{name}'")
    runner.run(jobs)
    return found


def main(settings: Settings) -> None:
    launch.require_one_process()
    names = [found for name in settings.tables for found in find_names(name)]
    results = Path(settings.results)
    results.mkdir(parents=True, exist_ok=True)
    for name in names:
        table = TABLES[name]
        runner = Runner(settings.jobs, "val_top1" if table.tunes else "test_top1")
        planner = make_planner(table.study, settings, find_bundled=find_bundled)
        tuned = tune.read_tuning(table.study, TABLES, results)
        if table.tunes:
            found = {"points": tune.tune_table(table, planner, tuned, runner, TABLES)}
            seeds, measure = list(table.study.seeds), "validation top-1, %"
        else:
            count, measure = settings.seeds or table.seeds, "test top-1, %"
            if count > table.seeds:  # fixed beforehand, so that none is added after a look
                raise ValueError(f"--seeds {count}: {name} has {table.seeds} seeds")
            seeds = list(range(table.first, table.first + count))
            trained = train(table, planner, tuned, runner, seeds)
            found = (table.find or estimate_accuracies)(table, trained)
        found = {"seeds": seeds, "measure": measure} | found
        path = results / f"{name}.json"
        record = runner.record(name, settings.extra, found)
        checkpoints.write_text(path, json.dumps(record, indent=1) + "\n")
        show(name, found)
        figures.draw_record(table, found, path)
        if table.picture:
            pictures.save(table.picture(trained), path.with_suffix(".png"))
        print(f"\nwrote {path}")


def find_names(name: str) -> list[str]:
    """A table, or all whose names begin with a word."""
    names = [name] if name in TABLES else [one for one in TABLES if one.startswith(name + "-")]
    if not names:
        raise ValueError(f"no table '{name}': choose from {', '.join(TABLES)}")
    return names


def show(name: str, found: dict) -> None:
    """A record, a line for each row."""
    for point, of_rows in found["points"].items():
        print(f"\n{name}, {point}: {found['measure']}, seeds: {len(found['seeds'])}")
        for row, cells in of_rows.items():
            print(f"  {row:<32} {format_row(cells)}")
    for name, cell in found.get("contrasts", {}).items():
        print(f"{name}: {format_cell(cell, '+.2f')}")


def format_row(cells: dict) -> str:
    if "chosen" in cells:
        return ", ".join(f"{name} {value}" for name, value in cells["chosen"].items())
    if "mean" not in cells:  # lists over layers
        return "; ".join(f"{what} {format_means(cell)}" for what, cell in cells.items())
    difference, recovery = cells.get("difference"), cells.get("recovery")
    parts = (cells, ".1f"), (difference, "+.1f"), (recovery, ".2f")
    return "  ".join(format_cell(*part) for part in parts)


if __name__ == "__main__":
    launch.run(main, parse)
