"""Accuracies of several seeds: means, paired differences, recovery, 95 % intervals.

Intervals are Student's t over seeds, from five seeds on. A seed draws the labelled images, the
first weights and their order, and a teacher where each seed has its own. The test images are the
same for all. Ratios are jackknifed (Tukey 1958), which for sums is the same.
"""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

BASELINE, CEILING = "from scratch", "fine-tuning"
FEWEST = 5  # seeds that give an interval
Values = Mapping[str, np.ndarray]  # row: its accuracy in per cent with each seed


def estimate(
    points: dict[str, Values],
    against: Mapping[str, str] | None = None,
    contrasts: Mapping[str, Callable[..., float]] = MappingProxyType({}),
) -> dict[str, dict]:
    """Estimates of the rows at each point, and contrasts: functions of the rows' means at them.

    against: the row that a row is compared with, if not BASELINE.
    """
    rows = {name: estimate_rows(values, against or {}) for name, values in points.items()}
    asked = {name: summarise(compute, *points.values()) for name, compute in contrasts.items()}
    return {"points": rows, "contrasts": asked}


def estimate_rows(values: Values, against: Mapping[str, str]) -> dict[str, dict]:
    """Accuracy of each row, its difference from another, in points, and its share of the gain
    of CEILING over BASELINE: its recovery, left out where that gain may be zero.
    """
    rows = {row: estimate_over_seeds(found) for row, found in values.items()}
    for row in values:
        other = against.get(row, BASELINE)
        if other in values and other != row:
            paired = estimate_over_seeds(values[row] - values[other])
            rows[row]["difference"] = paired | {"from": other}
    if not {BASELINE, CEILING} <= values.keys():
        return rows
    gain = estimate_over_seeds(values[CEILING] - values[BASELINE])
    low, high = gain["interval"] or [gain["mean"]] * 2
    for row in values.keys() - {BASELINE} if low > 0 or high < 0 else ():
        rows[row]["recovery"] = summarise(lambda of: compute_share(of, row, CEILING), values)
    return rows


def compute_share(of: Mapping[str, float], row: str, other: str) -> float:
    """A row's gain over BASELINE as a share of another row's gain."""
    gain = of[other] - of[BASELINE]
    return (of[row] - of[BASELINE]) / gain if gain else np.nan


def estimate_over_seeds(values: np.ndarray) -> dict:
    """The mean of one value for each seed, with its interval."""
    found = summarise(lambda of: of[""], {"": values})
    return found | {"values": [round(float(value), 4) for value in values]}


def estimate_layers(layers: Iterable[Sequence[float]]) -> dict[str, list]:
    """The same of each layer, as lists over layers."""
    cells = [estimate_over_seeds(np.array(values)) for values in layers]
    return {what: [cell[what] for cell in cells] for what in ("mean", "interval", "values")}


def summarise(compute: Callable[..., float], *points: Values) -> dict:
    """What `compute` makes of the rows' means at each point, with a jackknife interval."""

    def compute_of(some: np.ndarray) -> float:
        return compute(*({row: v[some].mean() for row, v in of.items()} for of in points))

    seeds = len(next(iter(points[0].values())))
    whole = float(compute_of(np.arange(seeds)))
    if seeds < FEWEST:
        return {"mean": whole, "interval": None}
    without = np.array([compute_of(np.delete(np.arange(seeds), i)) for i in range(seeds)])
    pseudo = seeds * whole - (seeds - 1) * without
    half = float(get_quantile(seeds - 1) * pseudo.std(ddof=1) / seeds**0.5)
    return {"mean": whole, "interval": [whole - half, whole + half] if half < np.inf else None}


def get_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by integrating its density."""
    t = np.linspace(0, 100, 200_001)
    mass = np.cumsum((1 + t**2 / freedom) ** (-(freedom + 1) / 2))
    return float(t[np.searchsorted(mass, 0.95 * mass[-1])])


def format_cell(cell: dict | int | None, form: str) -> str:
    """A figure and its 95 % interval, or, of few seeds, the figure of each. Or a count."""
    if not cell or isinstance(cell, int):
        return f"{cell:,}" if cell else ""
    form = form.replace(".", "z.")  # no -0.00
    between, values = cell.get("interval"), cell.get("values", ())
    ends = f" [{between[0]:{form}}, {between[1]:{form}}]" if between else ""
    if not between and len(values) > 1:
        ends = f" ({', '.join(format(value, form) for value in values)})"
    return format(cell["mean"], form) + ends


def pack(correct: np.ndarray) -> list[str]:
    """Whether each image was classified correctly, (seeds, images), as text: a bit for each."""
    return [base64.b64encode(np.packbits(of_seed)).decode() for of_seed in correct]


def unpack(packed: list[str], images: int) -> np.ndarray:
    rows = [np.frombuffer(base64.b64decode(text), np.uint8) for text in packed]
    return np.unpackbits(np.stack(rows), axis=1)[:, :images].astype(bool)
