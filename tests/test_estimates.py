"""Intervals: against loops written out, against t, and against what they promise."""

import numpy as np
import pytest

from experiments import estimates


def of(correct, groups, against=None):
    return estimates.estimate({"": correct}, groups, against)["points"][""]


def simulated(random, seeds=10, digits=500, places=4, gain=0.05):
    """Two rows whose true difference is `gain`: seeds and digits have effects of their own."""
    of_seed = random.normal(0, 0.02, (2, seeds, 1, 1))
    of_digit = random.normal(0, 0.3, (1, digits, 1))
    chance = 0.5 + of_digit + np.stack([of_seed[0], of_seed[1] + gain])
    noise = random.uniform(size=(2, seeds, digits, places))
    correct = noise < np.clip(chance, 0, 1)
    return dict(zip(("from scratch", "copy"), correct.reshape(2, seeds, -1), strict=True))


GROUPS = np.repeat(np.arange(500), 4)


def contrasts(points, asked):
    return estimates.estimate(points, GROUPS, contrasts=asked)["contrasts"]


def test_resampled_accuracies_are_those_of_loops(monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 5)
    monkeypatch.setattr(estimates, "AT_A_TIME", 5)
    correct = simulated(np.random.default_rng(1), seeds=3, digits=6)["copy"]
    groups = np.repeat(np.arange(6), 4)
    found = estimates.resample({"copy": correct}, groups)["copy"]
    mean = 100 * correct.mean()
    assert found[0] == pytest.approx(mean)
    random = np.random.default_rng(0)
    seeds = random.multinomial(3, [1 / 3] * 3, 5)
    digits = random.multinomial(6, [1 / 6] * 6, 5)
    for b in range(5):
        drawn = [
            correct[s, i]
            for s in range(3) for _ in range(seeds[b, s])
            for i in range(24) for _ in range(digits[b, groups[i]])
        ]  # fmt: skip
        wider = np.sqrt(3 / 2) * (100 * np.mean(drawn) - mean)  # of three seeds
        assert found[1 + b] == pytest.approx(mean + wider)


def test_differences_are_paired_and_recovery_is_their_ratio():
    random = np.random.default_rng(2)
    correct = simulated(random)
    correct["fine-tuning"] = simulated(random)["copy"] | correct["copy"]
    found = of(correct, GROUPS)
    means = {row: 100 * c.mean() for row, c in correct.items()}
    for row in correct:
        assert found[row]["mean"] == pytest.approx(means[row])
    gain, gap = means["copy"] - means["from scratch"], means["fine-tuning"] - means["from scratch"]
    assert found["copy"]["difference"]["mean"] == pytest.approx(gain)
    assert found["copy"]["recovery"]["mean"] == pytest.approx(gain / gap)
    assert found["fine-tuning"]["recovery"] == {"mean": 1.0, "interval": [1.0, 1.0]}
    assert "recovery" not in found["from scratch"]
    low, high = found["copy"]["difference"]["interval"]
    assert low < gain < high
    wide = found["copy"]["interval"]  # of the row alone: digits do not cancel
    assert high - low < wide[1] - wide[0]
    one_seed = of({row: c[:1] for row, c in correct.items()}, GROUPS)["copy"]
    assert one_seed["interval"] is None and one_seed["difference"]["interval"] is None


@pytest.mark.slow
def test_contrasts_are_resampled_alike_at_all_points():
    correct = simulated(np.random.default_rng(6))
    other = {row: c[:, ::-1] for row, c in correct.items()}  # other images are right, as many
    asked = {
        "difference": lambda at, _: at["copy"] - at["from scratch"],
        "nothing": lambda at, again: at["copy"] - again["copy"],
    }
    found = contrasts({"a": correct, "b": correct}, asked)
    paired = of(correct, GROUPS)["copy"]["difference"]
    assert found["difference"] == {name: paired[name] for name in ("mean", "interval")}
    assert found["nothing"] == {"mean": 0, "interval": [0, 0]}
    between = contrasts({"a": correct, "b": other}, asked)["nothing"]
    assert between["mean"] == 0 and between["interval"][0] < 0 < between["interval"][1]


def test_a_share_of_perhaps_nothing_has_no_interval():
    correct = simulated(np.random.default_rng(7), gain=0.1)
    correct["half"] = np.where(np.arange(2000) % 2, correct["copy"], correct["from scratch"])
    asked = {"half": lambda of: estimates.compute_share(of, "half", "copy")}
    found = contrasts({"": correct}, asked)["half"]
    low, high = found["interval"]
    assert low < found["mean"] < high
    correct["copy"] = correct["from scratch"][:, ::-1]
    assert contrasts({"": correct}, asked)["half"]["interval"] is None


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 1000)
    random, inside = np.random.default_rng(4), 0
    for _ in range(200):
        found = of(simulated(random, digits=100), np.repeat(np.arange(100), 4))
        low, high = found["copy"]["difference"]["interval"]
        inside += low <= 100 * 0.05 <= high
    assert inside / 200 >= 0.9  # 95 %, less what 200 studies leave to chance
