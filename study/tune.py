"""Equal tuning: the same number of trials for every row, on validation images.

First rates, then weight decays, ways to regularise, a setting of the row's own, each at the best.
"""

from collections.abc import Iterable
from pathlib import Path

from common.progress import get_validation
from study.engine import Flags, Planner, Study, Table
from study.jobs import Runner, read_record

Tuned = dict[str, dict[str, dict]]  # point: row: what was chosen, and all that was tried


def tune(
    table: Table, planner: Planner, known: Tuned, runner: Runner, tables: dict[str, Table]
) -> Tuned:
    """Settings for the rows of a table at all its points, and what was tried. `known`: so far."""
    study, rows, points = table.study, table.rows, table.points
    others = [row for row in list_teachers(rows, study) if row not in rows]
    for point in points:
        check_tuned(get_chosen(known.get(point, {})), study, others, tables, {point})
    found = {(point, row): {} for point in points for row in rows}
    best = {key: choose_first(key[1], study) for key in found}
    for stage in range(4):
        jobs, trials = {}, {}
        for point, row in found:
            others = get_chosen(known.get(point, {}))
            for flags in list_options(row, stage, best[point, row], study):
                own = others | {row: flags}
                planned = [planner.plan(row, seed, points[point], own) for seed in study.seeds]
                trials[point, row, tuple(flags.items())] = [list(some)[-1] for some in planned]
                jobs |= {name: job for some in planned for name, job in some.items()}
        results = runner.run(jobs) if jobs else {}
        for (point, row, flags), names in trials.items():
            found[point, row][flags] = [get_validation(results[name]) for name in names]
        for key, tried in found.items():
            best[key] = dict(max(tried, key=lambda flags: sum(tried[flags])))
    return {
        point: {row: record_trials(best[point, row], found[point, row]) for row in rows}
        for point in points
    }


def choose_first(row: str, study: Study) -> Flags:
    name, values = study.own[row]
    return {"lr": study.rates[1], "weight_decay": study.decays[0], name: values[0]}


def list_options(row: str, stage: int, best: Flags, study: Study) -> list[Flags]:
    """What a stage tries: rates; more weight decays; ways to regularise; its own setting."""
    name, values = study.own[row]
    stages = (
        [{"lr": rate} for rate in study.rates],
        [{"weight_decay": decay} for decay in study.decays[1:]],
        study.mixes,
        [{name: value} for value in values[1:]],
    )
    return [best | flags for flags in stages[stage]]


def record_trials(best: Flags, tried: dict[tuple, list[float]]) -> dict:
    trials = [{"flags": dict(flags), "validation": scores} for flags, scores in tried.items()]
    return {"chosen": best, "tried": trials}


def get_chosen(rows: dict[str, dict]) -> dict[str, Flags]:
    return {row: found["chosen"] for row, found in rows.items()}


def read_tuning(study: Study, tables: dict[str, Table], results: Path) -> Tuned:
    """What all tunings of a study have found so far."""
    found = {}
    for name, table in tables.items():
        path = results / f"{name}.json"
        if table.tunes and table.study.base is study.base and path.exists():
            for point, of_rows in read_record(path)["points"].items():
                found[point] = found.get(point, {}) | of_rows
    return found


def check_tuned(
    chosen: dict[str, Flags], study: Study, needed: Iterable[str], tables: dict, points: set[str]
) -> None:
    """ValueError unless the settings of these rows are known, in a study that tunes any."""
    for row in needed if study.own else ():
        row = row if row in study.own else study.rows[row].tuned_as
        if row and row not in chosen:
            tuning = {k: t for k, t in tables.items() if t.tunes and t.study.base is study.base}
            here = {k: t for k, t in tuning.items() if points & t.points.keys()}
            first = next((k for k, table in here.items() if row in table.rows), "its tuning")
            raise ValueError(f"'{row}' has no settings yet: first reproduce {first}")


def list_teachers(asked: Iterable[str], study: Study) -> list[str]:
    """The rows whose nets others need."""
    teachers = (study.rows[row].teacher for row in asked)
    return [teacher for teacher in teachers if teacher in study.rows]
