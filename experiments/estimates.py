"""What runs of several seeds say of the rows of a table: accuracies, paired differences, recovery.

Two things are drawn by chance, seeds and test images, and both are resampled (Owen 2007, "The
pigeonhole bootstrap", which errs on the side of wide intervals). All rows are resampled alike, so
that differences are paired: the same seeds, the same images.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

BASELINE, CEILING = "from scratch", "fine-tuning"
RESAMPLES, AT_A_TIME = 10_000, 100


Correct = dict[str, np.ndarray]  # row: whether an image was classified rightly, (seeds, images)


def estimates(
    points: dict[str, Correct],
    groups: np.ndarray,
    against: dict[str, str] | None = None,
    asked: Mapping[str, Callable[..., np.ndarray]] = MappingProxyType({}),
) -> dict[str, dict]:
    """What is known of the rows at each point, and what is asked of several; 95 % intervals.

    points: of each its rows, see `of_rows`. `groups`: (images,), the sample that an image belongs
    to: those of one sample are resampled together. `against`: what a row is compared with (BASELINE
    if not given). contrasts: what the functions `asked` make of accuracies; they take an argument
    for each point, its rows', which are resampled alike at all points.
    """
    resampled = {point: resample(correct, groups) for point, correct in points.items()}
    return {
        "points": {
            point: of_rows(correct, resampled[point], against or {})
            for point, correct in points.items()
        },
        "contrasts": {
            name: described(function(*resampled.values())) for name, function in asked.items()
        },
    }


def of_rows(correct: Correct, resampled: Correct, against: dict[str, str]) -> dict[str, dict]:
    """Of each row: accuracy, difference from another row, recovery, in per cent (that: a ratio)

        recovery = (row - BASELINE) / (CEILING - BASELINE)

    `values` are those of each seed. Without a second seed there is no interval,
    and none of recovery where it is not sure that there is anything to recover.
    """
    values = {row: 100 * found.mean(axis=1) for row, found in correct.items()}
    found = {}
    for row, figures in resampled.items():
        found[row] = described(figures) | {"values": rounded(values[row])}
        other = against.get(row, BASELINE)
        if other in correct and other != row:
            paired = described(figures - resampled[other])
            paired |= {"from": other, "values": rounded(values[row] - values[other])}
            found[row]["difference"] = paired
        if {BASELINE, CEILING} <= correct.keys() and row != BASELINE:
            found[row]["recovery"] = described(recovery(resampled, row))
    return found


def resample(correct: Correct, groups: np.ndarray) -> Correct:
    """Accuracies of rows in per cent: of the sample, then of resamples, alike for all rows.

    Of one seed there are no resamples.
    """
    seeds, samples = len(next(iter(correct.values()))), groups.max() + 1
    sizes = np.bincount(groups, minlength=samples)
    sums = {
        row: np.stack([np.bincount(groups, of_seed, minlength=samples) for of_seed in found])
        for row, found in correct.items()
    }
    accuracies = {row: [[found.mean()]] for row, found in correct.items()}
    random = np.random.default_rng(0)
    for _ in range(RESAMPLES // AT_A_TIME if seeds > 1 else 0):
        of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), AT_A_TIME)
        of_samples = random.multinomial(samples, np.full(samples, 1 / samples), AT_A_TIME)
        for row, right in sums.items():
            drawn = ((of_seeds @ right) * of_samples).sum(axis=1)
            accuracies[row].append(drawn / (seeds * (of_samples @ sizes)))
    return {row: widened(100 * np.concatenate(found), seeds) for row, found in accuracies.items()}


def widened(figures: np.ndarray, seeds: int) -> np.ndarray:
    """A bootstrap of n values finds their deviation too small by the root of (n - 1) / n."""
    return figures[0] + math.sqrt(seeds / max(seeds - 1, 1)) * (figures - figures[0])


def recovery(accuracies: dict[str, np.ndarray], row: str) -> np.ndarray:
    return share(accuracies, row, CEILING)


def share(accuracies: dict[str, np.ndarray], row: str, other: str) -> np.ndarray:
    """The share of another row's gain over BASELINE that a row has.

    nan in all resamples where that gain is perhaps nothing: a ratio to it has no bounds.
    """
    part, whole = (accuracies[name] - accuracies[BASELINE] for name in (row, other))
    between = interval(whole)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = part / whole
    if between and between[0] <= 0 <= between[1]:
        found[1:] = np.nan
    return found


def described(figures: np.ndarray) -> dict:
    """`figures`: of the sample itself, then of resamples of it."""
    return {"mean": float(figures[0]), "interval": interval(figures)}


def interval(figures: np.ndarray) -> list[float] | None:
    """The middle 95 % of the resampled figures."""
    if len(figures) < 2 or not np.isfinite(figures).all():
        return None
    return [float(end) for end in np.quantile(figures[1:], [0.025, 0.975])]


def draws(seeds: int) -> np.ndarray:
    """How often each seed counts: once, then as often as it is drawn: (1 + resamples, seeds)."""
    random = np.random.default_rng(0)
    resamples = RESAMPLES if seeds > 1 else 0
    drawn = random.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)
    return np.concatenate([np.ones((1, seeds), int), drawn])


def over_seeds(values: np.ndarray) -> dict:
    """The mean of one value for each seed, with its interval."""
    seeds = len(values)
    return described(widened(draws(seeds) @ values / seeds, seeds))


def rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]
