"""Intervals: against t by hand, and loops that leave one seed out."""

import json
from pathlib import Path

import numpy as np
import pytest

from study import estimates, report, reproduce

RESULTS = Path(__file__).parents[2] / "study" / "results"


def draw(seeds, random, copy=5.0, tuned=10.0):
    """Accuracies of three rows: the seed's own effect is the same in all, so pairing removes it."""
    shared = random.normal(70, 3, seeds)
    gains = {"from scratch": 0.0, "copy": copy, "fine-tuning": tuned}
    return {row: shared + gain + random.normal(0, 0.5, seeds) for row, gain in gains.items()}


def test_quantiles_are_those_of_a_table_of_student():
    for freedom, expected in ((4, 2.776), (9, 2.262), (29, 2.045)):
        assert estimates.get_quantile(freedom) == pytest.approx(expected, abs=2e-3)


def test_differences_are_paired_and_recovery_is_their_ratio():
    values = draw(10, np.random.default_rng(2))
    found = estimates.estimate({"": values})["points"][""]
    gains = {row: v - values["from scratch"] for row, v in values.items()}
    mean, deviation = gains["copy"].mean(), gains["copy"].std(ddof=1)
    half = 2.262 * deviation / 10**0.5
    cell = found["copy"]["difference"]
    expected = [mean, mean - half, mean + half]
    assert [cell["mean"], *cell["interval"]] == pytest.approx(expected, rel=1e-3)
    assert half < np.diff(found["copy"]["interval"]) / 4  # of the row alone
    recovery = mean / gains["fine-tuning"].mean()
    assert found["copy"]["recovery"]["mean"] == pytest.approx(recovery)
    assert found["fine-tuning"]["recovery"] == {"mean": 1.0, "interval": [1.0, 1.0]}
    assert "recovery" not in found["from scratch"]
    few = estimates.estimate({"": {row: v[:4] for row, v in values.items()}})["points"][""]
    assert few["copy"]["interval"] is None and few["copy"]["difference"]["interval"] is None


def test_a_ratio_leaves_out_one_seed_after_the_other():
    values = draw(6, np.random.default_rng(3))
    found = estimates.estimate({"": values})["points"][""]["copy"]["recovery"]

    def share(keep):
        of = {row: v[keep].mean() for row, v in values.items()}
        return (of["copy"] - of["from scratch"]) / (of["fine-tuning"] - of["from scratch"])

    whole = share(range(6))
    pseudo = [6 * whole - 5 * share(np.arange(6) != i) for i in range(6)]
    half = estimates.get_quantile(5) * np.std(pseudo, ddof=1) / 6**0.5
    assert found["interval"] == pytest.approx([whole - half, whole + half])
    nothing = draw(6, np.random.default_rng(4), tuned=0.0)
    alike = dict.fromkeys(nothing, np.full(2, 50.0))
    for rows in (nothing, alike):
        assert "recovery" not in estimates.estimate({"": rows})["points"][""]["copy"]


RECORDS = [path for path in RESULTS.glob("*.json") if path.stem in reproduce.TABLES]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_interval_follows_from_its_record_alone(path):
    record = json.loads(path.read_text())
    again = report.recompute(record, reproduce.TABLES[path.stem])
    for name, cell in list_cells(again):
        assert cell["interval"] == pytest.approx(dict(list_cells(record))[name]["interval"]), name
    assert json.loads(json.dumps(again)).keys() == record.keys()


def list_cells(part, name=""):
    """All figures of a record with an interval, by their paths."""
    for key, value in part.items() if isinstance(part, dict) else ():
        if isinstance(value, dict):
            if isinstance((value.get("interval") or [None])[0], float):
                yield f"{name}/{key}", value
            yield from list_cells(value, f"{name}/{key}")
