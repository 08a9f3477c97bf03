"""What runs of several seeds say of the rows of a table: accuracies, paired differences, recovery.

Two things are drawn by chance, seeds and test images, and both are resampled (Owen 2007, "The
pigeonhole bootstrap", which errs on the side of wide intervals). All rows are resampled alike, so
that differences are paired: the same seeds, the same images.
"""

import math

import numpy as np

BASELINE, CEILING = "from scratch", "fine-tuning"
RESAMPLES, AT_A_TIME = 10_000, 100


def estimates(
    correct: dict[str, np.ndarray],
    groups: np.ndarray,
    against: dict[str, str] | None = None,
) -> dict[str, dict]:
    """Of each row: accuracy, difference from another row, recovery; with 95 % intervals.

    `correct`: (seeds, images), whether an image was classified rightly. `groups`: (images,), the
    sample that an image belongs to: those of one sample are resampled together. `against`: what a
    row is compared with (BASELINE if not given). All in per cent (recovery: a ratio)

        recovery = (row - BASELINE) / (CEILING - BASELINE)

    `values` are those of each seed. Without a second seed there is no interval,
    and none of recovery where it is not sure that there is anything to recover.
    """
    seeds = len(next(iter(correct.values())))
    resampled = resample(correct, groups)
    values = {row: 100 * found.mean(axis=1) for row, found in correct.items()}

    def described(function, *rows: str) -> dict:
        # The first of the resampled figures is that of the sample itself.
        figures = function(*(resampled[row] for row in rows))
        return {"mean": float(figures[0]), "interval": interval(figures, seeds)}

    known, nothing = {BASELINE, CEILING} <= correct.keys(), False
    if known and (gap := described(np.subtract, CEILING, BASELINE)["interval"]):
        nothing = gap[0] <= 0 <= gap[1]  # is perhaps all there is to recover
    found = {}
    for row in correct:
        found[row] = described(lambda a: a, row) | {"values": rounded(values[row])}
        other = (against or {}).get(row, BASELINE)
        if other in correct and other != row:
            paired = described(np.subtract, row, other)
            paired |= {"from": other, "values": rounded(values[row] - values[other])}
            found[row]["difference"] = paired
        if known and row != BASELINE:
            found[row]["recovery"] = described(recovery, row, BASELINE, CEILING)
            if nothing:  # a ratio to it has no bounds
                found[row]["recovery"]["interval"] = None
    return found


def resample(correct: dict[str, np.ndarray], groups: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracies of rows in per cent: of the sample, then of resamples, alike for all rows."""
    seeds, samples = len(next(iter(correct.values()))), groups.max() + 1
    sizes = np.bincount(groups, minlength=samples)
    sums = {
        row: np.stack([np.bincount(groups, of_seed, minlength=samples) for of_seed in found])
        for row, found in correct.items()
    }
    accuracies = {row: [[found.mean()]] for row, found in correct.items()}
    random = np.random.default_rng(0)
    for _ in range(RESAMPLES // AT_A_TIME):
        of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), AT_A_TIME)
        of_samples = random.multinomial(samples, np.full(samples, 1 / samples), AT_A_TIME)
        for row, right in sums.items():
            drawn = ((of_seeds @ right) * of_samples).sum(axis=1)
            accuracies[row].append(drawn / (seeds * (of_samples @ sizes)))
    return {row: 100 * np.concatenate(found) for row, found in accuracies.items()}


def recovery(row: np.ndarray, baseline: np.ndarray, ceiling: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return (row - baseline) / (ceiling - baseline)


def interval(figures: np.ndarray, seeds: int) -> list[float] | None:
    """The middle 95 % of the resampled figures, made wider for few seeds.

    A bootstrap of n values finds their deviation too small by the root of (n - 1) / n.
    """
    if seeds < 2 or not np.isfinite(figures).all():
        return None
    wider = math.sqrt(seeds / (seeds - 1))
    return [
        float(figures[0] + wider * x) for x in np.quantile(figures[1:] - figures[0], [0.025, 0.975])
    ]


def over_seeds(values: np.ndarray) -> list[float] | None:
    """The 95 % interval of the mean of one value for each seed."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    figures = np.concatenate([[values.mean()], values[drawn].mean(axis=1)])
    return interval(figures, len(values))


def rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]
