"""The study: every table, each with one command.

    python -m study.reproduce TABLE [TABLE ...] [--seeds 10]
    python -m study.reproduce related        all whose names begin with it

Writes study/results/TABLE.json and a picture. Killed at any moment, the same
command resumes. Runs that several tables share are made once. What was expected
of each table before it was run, and what was found: study/LOG.md.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import launch
from common.settings import Base, parse_settings, setting
from study import tune
from study.engine import Planner, Runs, Table, estimate_accuracies
from study.jobs import Job, Runner
from study.report import RESULTS, TABLES, format_record, write_record


@dataclass(frozen=True)
class Settings(Base):
    tables: tuple[str, ...] = setting((), "one table or several", low=1)
    jobs: int = setting(0, "runs at a time [one per CPU core, or one on a GPU]")
    data_dir: str = setting("", "where images that do not come along are")
    runs: str = setting("runs/reproduce", "folder of the runs")
    extra: str = setting("", "more arguments for every training: '--device cpu'")
    seeds: int = setting(0, "runs of each row, each with its own seed [the table's]", low=1)
    results: str = setting("study/results", "folder of the records, those of tuning too")


def parse(argv: Sequence[str]) -> Settings:
    return parse_settings(__doc__ + list_tables(), Settings, {}, argv)


def list_tables() -> str:
    text = ""
    for name, table in TABLES.items():
        path, cost = RESULTS / f"{name}.json", "not recorded yet"
        if path.exists():
            record = json.loads(path.read_text())
            runs, minutes = record["runs"], record["training_minutes"]
            cost = f"{runs} runs, {minutes:.0f} min on {record['device']}"
        text += f"\n  {name}\n    {table.about}\n    {cost}"
    return text


def plan(table: Table, planner: Planner, tuned: tune.Tuned, seeds) -> tuple[dict[str, Job], Runs]:
    """All jobs of a table, and those of them that are its runs."""
    jobs, found = {}, {}
    for point, flags in table.points.items():
        rows, count = table.fewer.get(point, (table.rows, len(seeds)))
        found[point] = {row: [] for row in rows}
        own = {k: v for name in (*table.tuned_at, point) for k, v in tuned.get(name, {}).items()}
        for row in rows:
            for seed in seeds[:count]:
                planned = planner.plan(row, seed, flags, own)
                found[point][row].append(list(planned.values())[-1])
                for name, job in planned.items():
                    if jobs.setdefault(name, job) != job:  # one would be taken for the other
                        raise ValueError(f"two different runs are called '{name}'")
    return jobs, found


def main(settings: Settings) -> None:
    launch.require_one_process()
    names = [found for name in settings.tables for found in find_names(name)]
    results = Path(settings.results)
    results.mkdir(parents=True, exist_ok=True)
    for name in names:
        table = TABLES[name]
        runner = Runner(settings.jobs, "val_top1" if table.tunes else "test_top1")
        images, extra = table.study.base["data"], tuple(settings.extra.split())
        if settings.data_dir and images not in ("digits", "scenes"):  # which come along
            extra += ("--data-dir", settings.data_dir)
        planner = Planner(table.study, Path(settings.runs) / images, extra)
        tuned = tune.read_tuning(table.study, TABLES, results)
        path = results / f"{name}.json"
        old = json.loads(path.read_text()) if path.exists() else {"seeds": []}
        if table.tunes:
            found = {"points": tune.tune(table, planner, tuned, runner)}
            seeds, measure = list(table.study.seeds), "validation top-1, %"
        else:
            count, measure = settings.seeds or table.seeds, "test top-1, %"
            if count > table.seeds:  # fixed beforehand, so that none is added after a look
                raise ValueError(f"--seeds {count}: {name} has {table.seeds} seeds")
            seeds = [*range(table.first, table.first + count)]
            jobs, trained = plan(table, planner, tuned, seeds)
            runner.run(jobs)
            found = (table.find or estimate_accuracies)(table, trained)
        found = {"seeds": seeds, "measure": measure} | found
        record = runner.record(name, settings.extra, found)
        if old["seeds"] and (settings.extra or len(old["seeds"]) > len(seeds)):
            path = Path(settings.runs) / path.name  # a trial does not replace the record
        write_record(record, table, path)
        if not table.tunes:
            print(format_record(record))
        print(f"\nwrote {path}")


def find_names(name: str) -> list[str]:
    """A table, or all whose names begin with a word."""
    names = [name] if name in TABLES else [one for one in TABLES if one.startswith(name + "-")]
    if not names:
        raise ValueError(f"no table '{name}': choose from {', '.join(TABLES)}")
    return names


if __name__ == "__main__":
    launch.run(main, parse)
