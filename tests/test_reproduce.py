"""The study: a figure is what its runs found, and a killed reproduction repeats none of them."""

from launch import Failed

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import attention_copy
import checkpoints
import data
import digits
import ensemble
import runs
import storage
import teachers
from augment import Normalise
from data import KINDS
from experiments import jobs, looks, nearest, report, reproduce, rows, shift, ship, tables, tune
from experiments.estimates import draws, estimates
from experiments.rows import MAIN, Runs
from lending import parse_layers

ROOT = Path(__file__).parent.parent
RESULTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "results").glob("*.json")}
SHARED = {"data": "folder", "model": "micro", "patch": 4, "image_size": 16, "workers": 0}
STUDY = rows.Study(
    rows=rows.ROWS,
    base=SHARED | {"num_labels": 24, "epochs": 1, "batch": 8},
    teacher={"epochs": 1},
    images=tuple(SHARED),
    own_teachers=True,
    seeds=(100,),
    rates=(1e-3, 2e-3),
    decays=(0.05, 0.5),
    own={row: (name, values[:2]) for row in MAIN for name, values in [tables.DIGITS.own[row]]},
)
AT = {"24 labels": {}}
TABLES = {
    "tuned": tables.Table("", STUDY, (*MAIN, rows.NEAREST), AT, tunes=True),
    "tested": tables.Table("", STUDY, (*MAIN, rows.NEAREST), AT),
    "looks": tables.TABLES["digits-looks"]._replace(rows=tuple(MAIN)),
    "looks of photographs": tables.TABLES["cifar10-looks"]._replace(study=STUDY, points=AT),
    "ensembles": tables.TABLES["digits-ensembles"],
    "shift": tables.TABLES["digits-shift"]._replace(points=tables.AT_BASE),
    "digits-tuning": tables.TABLES["digits-tuning"],
}


@pytest.fixture
def places(tmp_path):
    """Arguments of a reproduction with runs of one epoch."""
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    return [*folders, "--jobs", "1", "--extra=--epochs 1 --warmup 0 --device cpu"]


class Names(list):
    fails_at = 0


@pytest.fixture
def ran(monkeypatch):
    """Runs in this process instead of others, and their names."""
    names = Names()

    def process(runner, name, job):
        names.append(name)
        script = jobs.SCRIPTS[job.script]
        script.main(script.parse([*job.argv, "--overwrite"]))
        if len(names) == names.fails_at:
            raise Failed("the power went")

    monkeypatch.setattr(jobs.Runner, "process", process)
    monkeypatch.setattr(nearest, "PLACEMENTS", 3)
    monkeypatch.setattr(reproduce, "TABLES", TABLES)
    return names


def reproduced(places, *tables) -> list[dict]:
    settings = reproduce.parse([*tables, *places])
    reproduce.main(settings)
    return [json.loads((Path(settings.results) / f"{name}.json").read_text()) for name in tables]


def test_settings_are_chosen_by_validation_and_a_table_is_what_its_runs_found(
    places, ran, photos, tmp_path
):
    places += ["--data-dir", str(photos), "--seeds", "2"]
    with pytest.raises(ValueError, match="first reproduce tuned"):
        reproduced(places, "tested")
    ran.fails_at = 5
    with pytest.raises(Failed):
        reproduced(places, "tuned")
    (tuned,) = reproduced(places, "tuned")
    assert len(ran) == len(set(ran)) == 1 + 4 * (2 + 1 + 1)  # a teacher, and trials of four rows
    assert tuned["runs"] == len(ran)
    for row, found in tuned["points"]["24 labels"].items():
        scores = [np.mean(trial["validation"]) for trial in found["tried"]]
        best = found["tried"][int(np.argmax(scores))]["flags"]
        assert found["chosen"] == best, row

    (table,) = reproduced(places, "tested")
    assert len(ran) == len(set(ran))
    correct = {row: [] for row in MAIN}
    for row, found in correct.items():
        chosen = tuned["points"]["24 labels"][row]["chosen"]
        for seed in (0, 1):
            folder = tmp_path / "runs" / "folder" / f"{row}{rows.described(chosen)} s{seed}"
            last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
            tested = storage.read(folder / "test.pt")
            found.append((tested["predicted"] == tested["labels"]).numpy())
            assert 100 * found[-1].mean() == pytest.approx(last["test_top1"])
            path = [str(folder / "model.pt")]
            assert ensemble.evaluate(path, ensemble.parse(path))["ensemble_top1"] == pytest.approx(
                last["test_top1"], rel=1e-6
            )
    correct = {row: np.stack(found) for row, found in correct.items()}
    for row, cells in estimates({"": correct}, np.arange(15))["points"][""].items():
        assert table["points"]["24 labels"][row]["values"] == cells["values"]
        assert table["points"]["24 labels"][row]["interval"] == pytest.approx(cells["interval"])
    assert len(table["commits"][0]) >= 7 and table["seeds"] == [0, 1]
    assert table["commit"] == runs.commit()
    assert rows.NEAREST in table["points"]["24 labels"]

    (seen,) = reproduced(places, "looks of photographs")
    seen = seen["points"]["24 labels"]
    names = {"teacher", "another teacher", "random net", *MAIN}
    assert seen.keys() == names and not seen["teacher"].keys() & set(looks.KINDS_OF_PATCH)
    assert_close(seen["attention copy"]["from_mean"], seen["teacher"]["from_mean"])


def test_what_is_read_off_runs_is_bounded_by_what_it_must_be(places, ran, tmp_path, monkeypatch):
    monkeypatch.setattr(looks, "IMAGES", 100)
    monkeypatch.setattr(digits, "PLACES", 1)
    monkeypatch.setattr(shift, "SHIFTS", {"inverted": shift.SHIFTS["inverted"]})
    usual = {row: tune.shown(tune.first(row, tables.DIGITS), {}) for row in MAIN}
    (tmp_path / "results").mkdir()
    record = {"points": {tables.BASE: usual}}
    (tmp_path / "results" / "digits-tuning.json").write_text(json.dumps(record))
    found, together, moved = reproduced([*places, "--seeds", "2"], "looks", "ensembles", "shift")
    seen = found["points"][tables.BASE]
    patches = [seen["patches"][kind]["mean"][0] for kind in looks.KINDS_OF_PATCH]
    assert sum(patches) == pytest.approx(1, abs=1e-3)
    for name in seen.keys() - {"patches"}:
        shares = np.array([seen[name][kind]["mean"] for kind in looks.KINDS_OF_PATCH])
        assert_close(shares.sum(axis=0), np.ones(4), atol=1e-3, rtol=0)
    assert max(map(abs, seen["teacher"]["divergence"]["mean"])) < 1e-4
    assert min(seen["teacher"]["cka"]["mean"]) > 0.999
    assert (
        max(map(abs, seen["attention copy"]["divergence"]["mean"])) < 1e-4
    )  # all its maps are lent

    table = together["points"][tables.BASE]
    for team in ("fine-tuning twice", "fine-tuning + distillation"):
        assert -1 <= table[team]["error_correlation"]["mean"] <= 1
        assert table[team]["difference"]["from"] in table
    shifts = moved["points"]
    assert shifts.keys() == {"inverted", shift.MORE_SCRAPS}
    assert shifts["inverted"].keys() == MAIN.keys()


def test_what_the_image_adds_to_a_map_is_what_position_alone_does_not_say():
    p = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64).softmax(dim=-1)
    p[1] = p[1, :1]  # the second layer looks the same way at all images
    mean, alike = p.mean(dim=1, keepdim=True), torch.full_like(p, 1 / 4)
    added, said = ((p * (p / q).log()).sum(-1).mean(dim=(1, 2, 3)) for q in (mean, alike))
    found = looks.changing(p)
    assert_close(found["of_image"], (added / said).tolist(), atol=1e-9, rtol=0)
    assert found["of_image"][0] > 0.1


def test_patches_are_of_the_kind_whose_ink_they_hold():
    split = digits.Split(2, Normalise(KINDS["digits"].normalization, "cpu"), torch.device("cpu"))
    digit, scraps = (canvas[:30] for canvas in split.layers("test"))
    kinds = looks.kinds_of_patches(digit, scraps, patch=3)
    for image in range(30):
        for i in range(16):
            y, x = 3 * (i // 4), 3 * (i % 4)
            ink = [c[image, 0, y : y + 3, x : x + 3].sum() > 0 for c in (digit, scraps)]
            assert kinds[image, i] == (0 if ink[0] else 1 if ink[1] else 2)
    images, _ = split.placed("test")
    assert_close(images[:30], torch.maximum(digit, scraps))


def test_models_that_err_alike_under_shift_lie_on_one_line(monkeypatch):
    usual = iter(np.random.default_rng(0).uniform(60, 95, 100))

    def accuracies(job):
        clean = next(usual)
        gone = 1 / (1 + np.exp(-(0.8 * shift.logit(np.array(clean)) - 0.5)))
        return {shift.USUAL: clean, "fog": 100 * gone - (5 if job == "worse" else 0)}

    monkeypatch.setattr(shift, "accuracies", accuracies)
    made = {
        str(i): {"from scratch": ["on"] * 4, "copy": ["on"] * 4, "fine-tuning": ["worse"] * 4}
        for i in range(3)
    }
    found = shift.shifted(made)["fog"]
    assert found["copy"]["difference"]["mean"] == pytest.approx(0, abs=1e-6)
    assert found["fine-tuning"]["difference"]["mean"] == pytest.approx(-5)
    assert found["fine-tuning"]["difference"]["interval"] == pytest.approx([-5, -5])


def test_the_line_is_that_of_least_squares_in_every_resample():
    random = np.random.default_rng(1)
    x, y = random.normal(size=(2, 5, 3))
    count = draws(5)[[0, 7]]
    slopes, heights = shift.lines(x, y, count)
    for of_seeds, slope, height in zip(count, slopes.ravel(), heights.ravel(), strict=True):
        drawn = [np.repeat(table, of_seeds, axis=0).ravel() for table in (x, y)]
        assert (slope, height) == pytest.approx(np.polyfit(*drawn, 1))


def test_every_row_gets_as_many_trials():
    for study in (tables.DIGITS, tables.CIFAR):
        counts = {}
        for row in study.own:
            best = tune.first(row, study)
            counts[row] = sum(len(tune.options(row, stage, best, study)) for stage in range(3))
        assert len(set(counts.values())) == 1, counts


@pytest.mark.parametrize("study", [tables.DIGITS, tables.CIFAR], ids=["digits", "cifar10"])
def test_each_row_is_a_run_that_can_be_asked_for_and_shares_all_that_it_must(study, tmp_path):
    runs, tuned = Runs(study, tmp_path), {row: {"lr": 1e-3} for row in rows.ROWS}
    asked = {}
    known = (
        row for row, made in rows.ROWS.items() if row in study.own or made.tuned_as in study.own
    )
    for row in known:
        made = runs.jobs(row, 3, {"scraps": 1}, tuned)
        for name, job in made.items():
            assert set(job.after) <= made.keys(), name
        asked[row] = list(made.values())[-1].settings()
    usual = asked["fine-tuning"]
    same = (
        "num_labels",
        "epochs",
        "warmup",
        "batch",
        "model",
        "patch",
        "mixup",
        "smoothing",
        "clip",
    )
    for row, settings in asked.items():
        for key in (*same, "scraps"):
            assert getattr(settings, key) == getattr(usual, key), (row, key)
        labels = settings.seed if settings.subset_seed < 0 else settings.subset_seed
        assert labels == 3, row
    again = asked["fine-tuning again"]
    assert (again.seed, again.teacher) == (1003, usual.teacher)


def test_a_study_of_one_teacher_takes_it_from_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "SHIPPED", tmp_path)
    runs, tuned = Runs(tables.CIFAR, tmp_path), {"attention copy": {}}
    teacher, made = runs.jobs("attention copy", 3, {}, tuned).values()
    assert made.settings().teacher == str(teacher.out / "model.pt")
    file, about = tmp_path / "cifar10.pt", {"data": "cifar10", "model": "mini"}
    file.touch()
    facts = {"for": about, "sha256": hashlib.sha256().hexdigest()}
    file.with_suffix(".json").write_text(json.dumps(facts))
    (made,) = runs.jobs("attention copy", 3, {}, tuned).values()
    assert made.settings().teacher == str(file)
    assert len(Runs(tables.DIGITS, tmp_path).jobs("attention copy", 3, {}, tuned)) == 2


def test_studies_of_the_same_images_share_no_run(tmp_path):
    made = {"cifar10-main": set(), "cifar10-recipe": set()}
    for name, outs in made.items():
        table = tables.TABLES[name]
        (flags,) = table.points.values()
        tuned = {row: {"lr": 1e-3} for row in table.rows}
        for row in table.rows:
            needed = Runs(table.study, tmp_path).jobs(row, 0, flags, tuned).values()
            outs |= {job.out for job in needed}
    assert all(len(outs) >= 4 for outs in made.values())
    assert made["cifar10-main"].isdisjoint(made["cifar10-recipe"])


@pytest.mark.parametrize("name", [n for n, table in reproduce.TABLES.items() if not table.tunes])
def test_runs_that_differ_lie_in_folders_of_their_own(name):
    settings = reproduce.parse([name, "--results", str(ROOT / "results")])
    runner = SimpleNamespace(run=lambda _: None)
    made = reproduce.train(reproduce.TABLES[name], settings, runner, [1, 2])
    every = (job for of_rows in made.values() for row in of_rows.values() for job in row)
    asked = {}
    for job in every:
        assert asked.setdefault(job.out, job) == job


def test_a_run_in_a_process_of_its_own_is_the_run_of_its_script(tmp_path):
    argv = ["--teacher", "none", "--epochs", "1", "--warmup", "0", "--num-labels", "50"]
    job = jobs.Job(
        "finetune", [*argv, "--device", "cpu", "--out", str(tmp_path / "a")], tmp_path / "a"
    )
    broken = jobs.Job(
        "finetune", [*job.argv[:-2], "--batch", "900", "--out", str(tmp_path / "b")], tmp_path / "b"
    )
    runner = jobs.Runner(1, 0, "test_top1")
    found = runner.run({"a": job})["a"]
    other = [*argv, "--device", "cpu", "--out", str(tmp_path / "c")]
    result = jobs.finetune.main(jobs.finetune.parse(other))
    assert found["test_top1"] == result["test_top1"]
    ours, theirs = (checkpoints.read(tmp_path / name / "model.pt").weights for name in "ac")
    assert_close(ours, theirs, rtol=0, atol=0)
    with pytest.raises(Failed, match="b failed: error: --batch 900 is more than"):
        runner.run({"b": broken})
    (tmp_path / "a" / "config.json").write_text("[]")
    assert job.result() is None and not job.begun()
    unasked = jobs.Job("finetune", ["--lr", "-1"], tmp_path / "d")
    with pytest.raises(ValueError, match="must be at least 0"):  # before anything is trained
        runner.run({"a": job, "d": unasked})
    assert not (tmp_path / "d").exists()


def test_a_teacher_that_is_shipped_is_found_and_checked(places, ran, tmp_path, monkeypatch, capsys):
    file = ship.ship(
        "digits", ship.parse(["digits", *places[:2], places[-1]]), tmp_path / "weights"
    )
    facts = json.loads(file.with_suffix(".json").read_text())
    about = {"data": "digits", "model": "micro", "patch": 3, "components": "", "image_size": 0}
    assert facts["for"] == about | {"scraps": tables.CLUTTER[tables.BASE]["scraps"]}
    assert str(places[1]) not in facts["command"]
    monkeypatch.setattr(teachers, "SHIPPED", file.parent)
    asked = attention_copy.parse(["--device", "cpu"])
    dataset = data.load(asked, torch.device("cpu"))
    found = teachers.find(asked, dataset)
    assert found.source == str(file) and found.method == "pretrain"
    assert teachers.shipped(asked.but(model="tiny")) is None
    assert teachers.shipped(asked.but(scraps=9)) is None
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"is not the file that digits\.json describes"):
        teachers.find(asked, dataset)
    file.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"digits\.json is damaged"):
        teachers.find(asked, dataset)


def test_a_run_is_known_by_its_teachers_weights_wherever_they_are(tmp_path):
    teacher = ROOT / "weights" / "digits.pt"
    moved, other = (tmp_path / f"{name}.pt" for name in ("moved", "other"))
    moved.write_bytes(teacher.read_bytes())
    state = storage.read(teacher)
    state["model"]["cls_token"] += 1
    storage.save(state, other)
    argv = ["--epochs", "1", "--warmup", "0", "--device", "cpu", "--out", str(tmp_path / "run")]
    jobs.finetune.main(jobs.finetune.parse([*argv, "--teacher", str(teacher)]))

    def done(source) -> bool:
        job = jobs.Job("finetune", [*argv, "--teacher", str(source)], tmp_path / "run")
        return job.result() is not None

    assert done(teacher) and done(moved) and not done(other) and not done("pretrain")


def test_runs_end_with_the_process_that_wants_them(tmp_path):
    """Or they would hold their folder against the same command, called again."""
    begin = (
        "import sys; from pathlib import Path; from experiments import jobs\n"
        "out = sys.argv[1]; argv = ['--teacher', 'none', '--device', 'cpu', '--out', out]\n"
        "jobs.Runner(1, 0, '').run({'a': jobs.Job('finetune', argv, Path(out))})"
    )
    out = tmp_path / "run"
    parent = subprocess.Popen([sys.executable, "-c", begin, str(out)], cwd=ROOT)
    until(lambda: (out / "last.pt").exists())
    parent.kill()
    parent.wait()
    until(lambda: "stopped by a signal" in (out / "output.txt").read_text())
    with runs.locked(out):
        assert not (out / "model.pt").exists()


def until(true, seconds=60):
    for _ in range(10 * seconds):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("it never came")


def test_a_damaged_record_is_named(places, tmp_path):
    path = tmp_path / "results" / "digits-tuning.json"
    path.parent.mkdir()
    for text in ('{"points": {', "{}", "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"digits-tuning\.json is damaged"):
            reproduce.main(reproduce.parse(["digits-clutter", *places]))


def test_unknown_tables_and_no_seeds_are_said(places):
    with pytest.raises(ValueError, match=r"no table .mine.: choose from digits-tuning"):
        reproduce.main(reproduce.parse(["mine"]))
    with pytest.raises(ValueError, match="--seeds 0: must be at least 1"):
        reproduce.parse(["digits-main", "--seeds", "0"])
    with pytest.raises(ValueError, match="name one table"):
        reproduce.parse([])


@pytest.mark.parametrize("name", [name for name in reproduce.TABLES if name in RESULTS])
def test_records_say_how_they_came_about_are_of_todays_rows_and_can_be_drawn(name, tmp_path):
    record, table = RESULTS[name], reproduce.TABLES[name]
    picture = tmp_path / f"{name}.png"
    reproduce.draw(table, record["points"], tmp_path, picture)
    assert picture.exists() == (not table.tunes and not table.find)
    assert record["command"].startswith(f"python -m experiments.reproduce {name} --seeds ")
    assert all("changes" not in commit for commit in record["commits"])
    if not table.find:
        assert {point: set(of_rows) for point, of_rows in record["points"].items()} == {
            point: set(table.rows) for point in table.points
        }
        assert list(record.get("contrasts", {})) == list(table.contrasts)


@pytest.mark.parametrize("page", report.PAGES)
def test_the_tables_of_a_readme_are_those_of_the_records(page):
    text = page.read_text()
    assert report.written(text, ROOT / "results") == text


def test_a_table_shows_means_and_intervals():
    cell = {"mean": 74.46, "interval": [72.55, 76.41]}
    other = {"mean": 2.2, "interval": None}
    rows = {"from scratch": cell, "copy": cell | {"difference": other, "recovery": other}}
    lines = report.markdown({"points": {"2 scraps": rows}}).splitlines()
    assert lines[2] == "| from scratch | 74.5 [72.5, 76.4] |  |  |"
    assert lines[3] == "| copy | 74.5 [72.5, 76.4] | +2.2 | 2.20 |"
    pair = {"mean": 75.0, "interval": None, "difference": other | {"from": "copy"}}
    lines = report.markdown({"points": {"2 scraps": rows | {"both": pair}}}).splitlines()
    assert "difference (− from scratch, if not said)" in lines[0]
    assert lines[4] == "| both | 75.0 | +2.2 (− copy) |  |"
    points = {"1 scrap": rows, "2 scraps": rows}
    lines = report.markdown({"points": points, "contrasts": {"last − first": cell}}).splitlines()
    assert lines[-1] == "| last − first | +74.46 [+72.55, +76.41] |" and lines[-4] == ""
    changes = {f"recovery of {row}: 1 scrap → 2 scraps": cell for row in ("copy", "distillation")}
    text = report.markdown({"points": points, "contrasts": changes})
    assert "| change from 1 scrap to 2 scraps |" in text and "\n| recovery of copy | +74.46" in text
    assert lines[0] == "|  | from scratch | copy | recovery: copy |"
    assert lines[2] == "| 1 scrap | 74.5 | 74.5 | 2.20 |"
    rows["copy"].pop("recovery")
    lines = report.markdown({"points": points}).splitlines()
    assert lines[0] == "|  | from scratch | copy | difference: copy |"
    assert lines[2] == "| 1 scrap | 74.5 | 74.5 | +2.2 |"
    points = dict.fromkeys(points, rows | {"both": pair})
    lines = report.markdown({"points": points}).splitlines()
    assert lines[0] == "|  | from scratch | copy | both | both − copy |"
    assert lines[2] == "| 1 scrap | 74.5 | 74.5 | 75.0 | +2.2 |"
    one, two = ({"mean": mean, "interval": None} for mean in ([0.5], [0.5, 1]))
    points = {"2 scraps": {"patches": {"digit": one}, "copy": {"digit": two}}}
    lines = report.markdown({"points": points})
    assert lines.splitlines()[2:] == ["| patches | 0.50 |", "| copy | 0.50 1.00 |"]


def test_the_base_task_is_what_the_rule_chose():
    assert reproduce.simplest(RESULTS["digits-tuning"]["points"]) == tables.BASE


@pytest.mark.parametrize("row", MAIN)
def test_the_defaults_of_the_scripts_are_what_tuning_chose(row):
    chosen = RESULTS["digits-tuning"]["points"][tables.BASE][row]["chosen"]
    none = ["--teacher", "none"] if MAIN[row].teacher == "none" else []
    usual = vars(jobs.SCRIPTS[MAIN[row].script].parse(none))
    for name, value in chosen.items():
        same = usual[name] == value
        if name == "layers":
            same = parse_layers(usual[name], 4) == parse_layers(value, 4)
        assert same, (name, usual[name], value)
