"""Equal tuning: the same number of trials for every row, on validation images.

One thing after the other: the rate; at the best rate weight decay; at the best of these one setting
of the row's own. The seeds of tuning are used by no table.
"""

from collections.abc import Iterable

from experiments.jobs import Runner
from experiments.rows import ROWS, Flags, Study
from progress import validation

RATES = (2e-3, 4e-3, 8e-3)
DECAYS = (0.05, 0.2, 0.5, 1.5)
SEEDS = (100, 101)


def tune(study: Study, runner: Runner, rows: Iterable[str], points: dict[str, Flags]) -> dict:
    """Of each point and row: the validation accuracies of each trial, and the flags chosen."""
    found = {(point, row): {} for point in points for row in rows}
    best = {key: first(key[1]) for key in found}
    for stage in range(3):
        jobs, trials = {}, []
        for point, row in found:
            for flags in options(row, stage, best[point, row]):
                trials.append((point, row, flags))
                jobs |= study.jobs(row, SEEDS, points[point], flags)
        results = runner.run(jobs)
        for point, row, flags in trials:
            names = [list(study.job(row, seed, points[point], flags))[-1] for seed in SEEDS]
            scores = [validation(results[name]) for name in names]
            found[point, row][tuple(flags.items())] = scores
        for key, tried in found.items():
            best[key] = dict(max(tried, key=lambda flags: sum(tried[flags])))
    return {
        point: {
            row: {"chosen": best[point, row], "tried": shown(found[point, row])} for row in rows
        }
        for point in points
    }


def first(row: str) -> Flags:
    name, values = ROWS[row].own
    return {"lr": RATES[1], "weight_decay": DECAYS[0], name: values[0]}


def options(row: str, stage: int, best: Flags) -> list[Flags]:
    """What a stage tries: the rates; more of weight decay; more of the row's own setting."""
    name, values = ROWS[row].own
    grid = (("lr", RATES), ("weight_decay", DECAYS[1:]), (name, values[1:]))
    what, tried = grid[stage]
    return [best | {what: value} for value in tried]


def shown(tried: dict[tuple, list[float]]) -> list[dict]:
    return [dict(flags) | {"validation": scores} for flags, scores in tried.items()]
