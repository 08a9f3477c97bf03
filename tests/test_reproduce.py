"""The table: every row is what its runs found, and a killed reproduction goes on without repeating them."""

import json
import statistics
from pathlib import Path

import pytest

import reproduce
import train

RAN = []


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """reproduce.py with runs of one epoch, in this process instead of others."""

    def process(runner, name, job):
        RAN.append(name)
        reproduce.SCRIPTS[job.script].main(reproduce.SCRIPTS[job.script].options([*job.argv, "--overwrite"]))
        if len(RAN) == 5:
            raise train.Failed("the power went")

    RAN.clear()
    monkeypatch.setattr(reproduce.Runner, "process", process)
    monkeypatch.setattr(reproduce, "LENGTHS", {"digits": (2,)})
    return ["--jobs", "1", "--seeds", "2", "--extra=--epochs 1 --warmup 0 --batch 50", "--runs", str(tmp_path / "runs"),
            "--results", str(tmp_path / "results")]  # fmt: skip


def test_a_table_is_the_mean_of_its_runs_and_goes_on_after_a_failure(quick, tmp_path):
    with pytest.raises(train.Failed):
        reproduce.main(reproduce.options(quick))
    result = reproduce.main(reproduce.options(quick))
    assert len(RAN) == len(set(RAN)) == 2 * (1 + len(reproduce.ROWS) + len(reproduce.MAIN))  # none ran twice
    logs = tmp_path / "runs" / "digits"
    for row, found in result["rows"].items():
        if not row.startswith("ensemble"):
            rows = [json.loads((logs / f"{row} s{s}" / "log.jsonl").read_text().splitlines()[-1]) for s in (0, 1)]
            assert found["values"] == [r["test_top1"] for r in rows]
        assert found["mean"] == pytest.approx(sum(found["values"]) / 2)
        assert found["std"] == pytest.approx(statistics.stdev(found["values"]))
    assert list(result["lengths"]) == [1, 2] and len(result["rows"]) == 9
    copied = [layer["mean"] for layer in result["likeness_to_teacher"]["attention copy"]["divergence"]]
    assert max(copied[:3]) < 1e-5 < copied[3]  # in the layers that are lent a copy looks where the teacher looks
    stored = json.loads((tmp_path / "results" / "digits.json").read_text())
    assert stored["rows"] == result["rows"] and (tmp_path / "results" / "digits.png").stat().st_size > 10_000
    assert stored["seeds"] == [0, 1] and len(stored["commit"]) >= 7


def test_the_figures_of_the_readme_are_those_of_the_record():
    root = Path(reproduce.__file__).parent
    result = json.loads((root / "results" / "digits.json").read_text())
    readme = (root / "README.md").read_text()
    for row, found in result["rows"].items():
        assert f"| {row} | {reproduce.cell(found)} |" in readme
    for epochs, rows in result["lengths"].items():
        assert f"| {epochs} | " + " | ".join(reproduce.cell(rows[row]) for row in reproduce.MAIN) + " |" in readme
    for row, found in result["likeness_to_teacher"].items():
        divergence, cka = (found[what][2] for what in ("divergence", "cka"))
        cells = f"{divergence['mean']:.3f} ± {divergence['std']:.3f} | {cka['mean']:.2f} ± {cka['std']:.2f}"
        assert f"| {row} | {cells} |" in readme


def test_the_recipes_are_those_that_were_chosen_on_validation_images():
    chosen = json.loads((Path(reproduce.__file__).parent / "results" / "digits-tuning.json").read_text())["chosen"]
    jobs = reproduce.jobs_of_seed(0, reproduce.options([]))
    for row, words in chosen.items():
        job = jobs[f"{row} s0"]
        settings = reproduce.SCRIPTS[job.script].options(job.argv)
        _, rate, option, value = words.split()
        assert settings.lr == float(rate) and str(getattr(settings, option.replace("-", "_"))) == value, row


def test_seeds_share_labels_where_an_ensemble_needs_it_and_rows_share_the_rest():
    jobs = reproduce.jobs_of_seed(3, reproduce.options([]))
    settings = {name: reproduce.SCRIPTS[job.script].options(job.argv) for name, job in jobs.items()}
    again, usual = settings["fine-tuning again s3"], settings["fine-tuning s3"]
    assert (again.seed, again.subset_seed, again.teacher) == (1003, 3, usual.teacher)
    for name, args in settings.items():
        if not name.startswith("teacher"):
            for key in ("labels", "epochs", "warmup", "batch", "model", "patch", "drop_path", "mixup", "smoothing", "clip"):
                assert getattr(args, key) == getattr(usual, key), (name, key)
            assert args.seed % 1000 == 3
