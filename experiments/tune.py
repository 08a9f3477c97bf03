"""Equal tuning: the same number of trials for every row, on validation images.

One thing after the other: the rate; at the best rate weight decay; at the best of these one setting
of the row's own. Its seeds are used by no table.
"""

from collections.abc import Iterable

from experiments.jobs import Runner
from experiments.rows import Flags, Runs, Study
from progress import validation

Tuned = dict[str, dict[str, dict]]  # point: row: what was chosen, and all that was tried


def tune(
    runs: Runs, runner: Runner, rows: Iterable[str], points: dict[str, Flags], known: Tuned
) -> Tuned:
    """The flags chosen for each row at each point, with the validation accuracies of its trials.

    `known`: of rows that were tuned before, whose nets others need.
    """
    study = runs.study
    found = {(point, row): {} for point in points for row in rows}
    best = {key: first(key[1], study) for key in found}
    for stage in range(3):
        jobs, trials = {}, {}
        for point, row in found:
            others = chosen(known.get(point, {}))
            for flags in options(row, stage, best[point, row], study):
                made = [
                    runs.jobs(row, seed, points[point], others | {row: flags})
                    for seed in study.seeds
                ]
                trials[point, row, tuple(flags.items())] = [list(job)[-1] for job in made]
                jobs |= {name: job for some in made for name, job in some.items()}
        results = runner.run(jobs)
        for (point, row, flags), names in trials.items():
            found[point, row][flags] = [validation(results[name]) for name in names]
        for key, tried in found.items():
            best[key] = dict(max(tried, key=lambda flags: sum(tried[flags])))
    return {
        point: {row: shown(best[point, row], found[point, row]) for row in rows} for point in points
    }


def first(row: str, study: Study) -> Flags:
    name, values = study.own[row]
    return {"lr": study.rates[1], "weight_decay": study.decays[0], name: values[0]}


def options(row: str, stage: int, best: Flags, study: Study) -> list[Flags]:
    """What a stage tries: the rates; more of weight decay; more of the row's own setting."""
    name, values = study.own[row]
    stages = (("lr", study.rates), ("weight_decay", study.decays[1:]), (name, values[1:]))
    what, tried = stages[stage]
    return [best | {what: value} for value in tried]


def shown(best: Flags, tried: dict[tuple, list[float]]) -> dict:
    trials = [{"flags": dict(flags), "validation": scores} for flags, scores in tried.items()]
    return {"chosen": best, "tried": trials}


def chosen(rows: dict[str, dict]) -> dict[str, Flags]:
    return {row: found["chosen"] for row, found in rows.items()}
