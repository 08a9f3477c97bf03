"""Equal tuning: the same number of trials for every row, on validation images.

First rates, each with the first weight decay (and with `joint` ones). Then more weight decays, ways
to regularise, and a setting of the row's own, each at the best so far.
"""

import itertools
import json
from pathlib import Path

from common.progress import get_validation
from study.engine import Planner, Study, Table
from study.jobs import Runner
from study.rows import Flags

Tuned = dict[str, dict[str, Flags]]  # point: row: its settings


def tune(table: Table, planner: Planner, known: Tuned, runner: Runner) -> dict[str, dict]:
    """Settings for the rows of a table at all its points, and what was tried. `known`: so far."""
    study, rows, points = table.study, table.rows, table.points
    found = {(point, row): {} for point in points for row in rows}
    best = {key: choose_first(key[1], study) for key in found}
    for stage in range(4):
        jobs, trials = {}, {}
        for point, row in found:
            for flags in list_options(row, stage, best[point, row], study):
                tuned = known.get(point, {}) | {row: flags}
                planned = [planner.plan(row, seed, points[point], tuned) for seed in study.seeds]
                trials[point, row, tuple(flags.items())] = [list(some)[-1] for some in planned]
                jobs |= {name: job for some in planned for name, job in some.items()}
        results = runner.run(jobs) if jobs else {}
        for (point, row, flags), names in trials.items():
            found[point, row][flags] = [get_validation(results[name]) for name in names]
        for key, tried in found.items():
            best[key] = dict(max(tried, key=lambda flags: sum(tried[flags])))
    recorded: dict[str, dict] = {point: {} for point in points}
    for (point, row), tried in found.items():
        trials = [{"flags": dict(flags), "validation": scores} for flags, scores in tried.items()]
        recorded[point][row] = {"chosen": best[point, row], "tried": trials}
    return recorded


def choose_first(row: str, study: Study) -> Flags:
    name, values = study.own[row]
    return {"lr": study.rates[1], "weight_decay": study.decays[0], name: values[0]}


def list_options(row: str, stage: int, best: Flags, study: Study) -> list[Flags]:
    """What a stage tries: rates; more weight decays; ways to regularise; its own setting."""
    name, values = study.own[row]
    pairs = itertools.product((study.decays[0], *study.joint), study.rates)
    stages = (
        [{"weight_decay": decay, "lr": rate} for decay, rate in pairs],
        [{"weight_decay": decay} for decay in study.decays[1:]],
        study.mixes,
        [{name: value} for value in values[1:]],
    )
    return [best | flags for flags in stages[stage]]


def read_tuning(study: Study, tables: dict[str, Table], results: Path) -> Tuned:
    """What all tunings of a study have chosen so far."""
    found: Tuned = {}
    for name, table in tables.items():
        path = results / f"{name}.json"
        if table.tunes and table.study.base is study.base and path.exists():
            for point, of_rows in json.loads(path.read_text())["points"].items():
                chosen = {row: cells["chosen"] for row, cells in of_rows.items()}
                found[point] = found.get(point, {}) | chosen
    return found
