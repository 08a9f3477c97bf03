"""Accuracies of several seeds: means, paired differences, recovery, 95 % intervals.

Seeds and test images are both drawn by chance, so both are resampled (Owen 2007, "The pigeonhole
bootstrap"). All rows are resampled alike, so differences are paired.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

BASELINE, CEILING = "from scratch", "fine-tuning"
RESAMPLES, AT_A_TIME = 10_000, 100
Correct = dict[str, np.ndarray]  # row: whether each image was classified correctly, (seeds, images)


def estimate(
    points: dict[str, Correct],
    groups: np.ndarray,
    against: dict[str, str] | None = None,
    contrasts: Mapping[str, Callable[..., np.ndarray]] = MappingProxyType({}),
) -> dict[str, dict]:
    """Estimates of the rows at each point, and contrasts across points.

    groups: (images,), the sample of each image. Images of one sample are resampled together.
    against: the row that a row is compared with, if not BASELINE.
    contrasts: functions of the resampled accuracies, with one argument for each point.
    """
    resampled = {point: resample(correct, groups) for point, correct in points.items()}
    rows = {k: estimate_rows(correct, resampled[k], against or {}) for k, correct in points.items()}
    asked = {name: summarise(compute(*resampled.values())) for name, compute in contrasts.items()}
    return {"points": rows, "contrasts": asked}


def estimate_rows(correct: Correct, resampled: Correct, against: dict[str, str]) -> dict[str, dict]:
    """Accuracy of each row and its difference from another row, in per cent, and its recovery.

        recovery = (row - BASELINE) / (CEILING - BASELINE)

    `values` are those of the seeds. One seed gives no interval. Recovery has none where the gain of
    CEILING may be zero.
    """
    values = {row: 100 * found.mean(axis=1) for row, found in correct.items()}
    rows = {}
    for row, accuracies in resampled.items():
        rows[row] = summarise(accuracies) | {"values": values[row].round(4).tolist()}
        other = against.get(row, BASELINE)
        if other in correct and other != row:
            paired = summarise(accuracies - resampled[other])
            paired |= {"from": other, "values": (values[row] - values[other]).round(4).tolist()}
            rows[row]["difference"] = paired
        if {BASELINE, CEILING} <= correct.keys() and row != BASELINE:
            rows[row]["recovery"] = summarise(compute_share(resampled, row, CEILING))
    return rows


def resample(correct: Correct, groups: np.ndarray) -> Correct:
    """Accuracies of rows in per cent: of the sample, then of resamples. One seed gives none."""
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
    return {row: widen(100 * np.concatenate(found), seeds) for row, found in accuracies.items()}


def widen(figures: np.ndarray, seeds: int) -> np.ndarray:
    """A bootstrap of n values underestimates their deviation by the root of (n - 1) / n."""
    return figures[0] + math.sqrt(seeds / max(seeds - 1, 1)) * (figures - figures[0])


def compute_share(accuracies: dict[str, np.ndarray], row: str, other: str) -> np.ndarray:
    """A row's gain over BASELINE as a share of another row's gain.

    The resamples are nan where that gain may be zero: the ratio has no bounds there.
    """
    part, whole = (accuracies[name] - accuracies[BASELINE] for name in (row, other))
    between = compute_interval(whole)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = part / whole
    if between and between[0] <= 0 <= between[1]:
        share[1:] = np.nan
    return share


def summarise(figures: np.ndarray) -> dict:
    """Mean and interval. `figures`: of the sample itself, then of its resamples."""
    return {"mean": float(figures[0]), "interval": compute_interval(figures)}


def compute_interval(figures: np.ndarray) -> list[float] | None:
    """The middle 95 % of the resampled figures."""
    if len(figures) < 2 or not np.isfinite(figures).all():
        return None
    return [float(end) for end in np.quantile(figures[1:], [0.025, 0.975])]


def draw_seeds(seeds: int) -> np.ndarray:
    """How often each seed counts: once, then as often as it is drawn: (1 + resamples, seeds)."""
    random = np.random.default_rng(0)
    resamples = RESAMPLES if seeds > 1 else 0
    drawn = random.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)
    return np.concatenate([np.ones((1, seeds), int), drawn])


def estimate_over_seeds(values: np.ndarray) -> dict:
    """The mean of one value for each seed, with its interval."""
    seeds = len(values)
    return summarise(widen(draw_seeds(seeds) @ values / seeds, seeds))
