"""The table: every row is what its runs found, and a killed reproduction repeats none of them."""

from launch import Failed

import json
import statistics
from pathlib import Path

import pytest

from experiments import jobs, reproduce
from experiments.figures import cell

ROOT = Path(__file__).parent.parent
RAN = []


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Arguments of a reproduction with runs of one epoch, in this process instead of others."""

    def process(runner, name, job):
        RAN.append(name)
        script = jobs.SCRIPTS[job.script]
        script.main(script.parse([*job.argv, "--overwrite"]))
        if len(RAN) == 5:
            raise Failed("the power went")

    RAN.clear()
    monkeypatch.setattr(jobs.Runner, "process", process)
    monkeypatch.setattr(reproduce, "LENGTHS", {"digits": (2,)})
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    return ["--jobs", "1", "--seeds", "2", "--extra=--epochs 1 --warmup 0 --batch 50", *places]


def test_a_table_is_the_mean_of_its_runs_and_goes_on_after_a_failure(quick, tmp_path):
    with pytest.raises(Failed):
        reproduce.main(reproduce.parse(quick))
    result = reproduce.main(reproduce.parse(quick))
    runs = 2 * (1 + len(reproduce.ROWS) + len(reproduce.MAIN))
    assert len(RAN) == len(set(RAN)) == runs  # none ran twice
    for row, found in result["rows"].items():
        if not row.startswith("ensemble"):
            logs = [
                tmp_path / "runs" / "digits" / f"{row} s{seed}" / "log.jsonl" for seed in (0, 1)
            ]
            last = [json.loads(log.read_text().splitlines()[-1]) for log in logs]
            assert found["values"] == [one["test_top1"] for one in last]
        assert found["mean"] == pytest.approx(sum(found["values"]) / 2)
        assert found["std"] == pytest.approx(statistics.stdev(found["values"]))
    assert list(result["lengths"]) == [1, 2] and len(result["rows"]) == 9
    of_copy = result["likeness_to_teacher"]["attention copy"]["divergence"]
    copied = [layer["mean"] for layer in of_copy]
    assert max(copied[:3]) < 1e-5 < copied[3]  # 0 in the layers that are lent
    stored = json.loads((tmp_path / "results" / "digits.json").read_text())
    assert stored["rows"] == result["rows"] and stored["seeds"] == [0, 1]
    assert len(stored["commit"]) >= 7
    assert (tmp_path / "results" / "digits.png").stat().st_size > 10_000


def test_the_figures_of_the_readme_are_those_of_the_record():
    result = json.loads((ROOT / "results" / "digits.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for row, found in result["rows"].items():
        assert f"| {row} | {cell(found)} |" in readme
    for epochs, rows in result["lengths"].items():
        cells = " | ".join(cell(rows[row]) for row in reproduce.MAIN)
        assert f"| {epochs} | {cells} |" in readme
    for row, found in result["likeness_to_teacher"].items():
        divergence, cka = (found[what][2] for what in ("divergence", "cka"))
        first = f"{divergence['mean']:.3f} ± {divergence['std']:.3f}"
        assert f"| {row} | {first} | {cka['mean']:.2f} ± {cka['std']:.2f} |" in readme


def test_the_recipes_are_those_that_were_chosen_on_validation_images():
    path = ROOT / "results" / "digits-tuning.json"
    found = reproduce.jobs_of_seed(0, reproduce.parse([]))
    for row, words in json.loads(path.read_text())["chosen"].items():
        job = found[f"{row} s0"]
        settings = jobs.SCRIPTS[job.script].parse(job.argv)
        _, rate, name, value = words.split()
        assert settings.lr == float(rate), row
        assert str(getattr(settings, name.replace("-", "_"))) == value, row


def test_seeds_share_labels_where_an_ensemble_needs_it_and_rows_share_the_rest():
    found = reproduce.jobs_of_seed(3, reproduce.parse([]))
    asked = {name: jobs.SCRIPTS[job.script].parse(job.argv) for name, job in found.items()}
    again, usual = asked["fine-tuning again s3"], asked["fine-tuning s3"]
    assert (again.seed, again.subset_seed, again.teacher) == (1003, 3, usual.teacher)
    same = ("num_labels", "epochs", "warmup", "batch", "model", "patch", "drop_path", "mixup")
    for name, settings in asked.items():
        if not name.startswith("teacher"):
            for key in (*same, "smoothing", "clip", "scraps"):
                assert getattr(settings, key) == getattr(usual, key), (name, key)
            assert settings.seed % 1000 == 3
