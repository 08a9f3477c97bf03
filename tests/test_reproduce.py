"""The study: a figure is what its runs found, and a killed reproduction repeats none of them."""

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import attention_copy
import data
import ensemble
import finetune
import train
from common import checkpoints
from common.launch import Failed
from common.settings import get_values, parse_layers
from datasets import digits
from experiments import figures, jobs, looks, report, reproduce, rows, ship, study, tables, tune
from experiments.estimates import estimate, unpack
from experiments.rows import CLUTTER, MAIN
from experiments.study import NEAREST, Planner
from teachers import find
from teachers.load import read_checkpoint

ROOT = Path(__file__).parent.parent
RESULTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "results").glob("*.json")}
SHARED = {"data": "folder", "model": "micro", "patch": 4, "image_size": 16, "workers": 0}
AT_24 = {"24 labels": {}}
STUDY = study.Study(
    rows.ROWS, SHARED | {"num_labels": 24, "epochs": 1, "batch": 8}, {"epochs": 1}, tuple(SHARED),
    seeds=(100,), rates=(1e-3, 2e-3), decays=(0.05, 0.5),
    own={row: (name, values[:2]) for row in MAIN for name, values in [tables.DIGITS.own[row]]},
)  # fmt: skip
TABLES = {
    "tuned": study.Table("", STUDY, (*MAIN, NEAREST), AT_24, tunes=True),
    "tested": study.Table("", STUDY, (*MAIN, NEAREST), AT_24),
    "looks": tables.TABLES["digits-looks"]._replace(rows=tuple(MAIN)),
    "looks of photographs": tables.TABLES["cifar10-looks"]._replace(study=STUDY, points=AT_24),
    "ensembles": tables.TABLES["digits-ensembles"],
    "digits-tuning": tables.TABLES["digits-tuning"],
}


@pytest.fixture
def places(tmp_path):  # arguments of a reproduction with runs of one epoch
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    return [*folders, "--jobs", "1", "--extra=--epochs 1 --warmup 0 --device cpu"]


@pytest.fixture
def ran(monkeypatch):
    """Runs in this process instead of others, and their names."""
    names = []

    def start_process(runner, name, job):
        names.append(name)
        script = jobs.load(job.script)
        script.main(script.parse([*job.argv, "--overwrite"]))
        if names[:1] == ["fail"] and len(names) == 6:
            raise Failed("the power went")

    monkeypatch.setattr(train, "catch_signals", lambda: nullcontext([]))  # not in threads
    monkeypatch.setattr(jobs.Runner, "start_process", start_process)
    monkeypatch.setattr(study, "PLACEMENTS", 3)
    monkeypatch.setattr(reproduce, "TABLES", TABLES)
    return names


def reproduce_all(places, *names) -> list[dict]:
    settings = reproduce.parse([*names, *places])
    reproduce.main(settings)
    return [json.loads((Path(settings.results) / f"{name}.json").read_text()) for name in names]


@pytest.mark.slow
def test_settings_are_chosen_by_validation_and_a_table_is_what_its_runs_found(
    places, ran, photos, tmp_path
):
    places += ["--data-dir", str(photos), "--seeds", "2"]
    with pytest.raises(ValueError, match="first reproduce tuned"):
        reproduce_all(places, "tested")
    ran.append("fail")
    with pytest.raises(Failed):  # after five runs
        reproduce_all(places, "tuned")
    ran.remove("fail")
    (tuned,) = reproduce_all(places, "tuned")
    assert len(ran) == len(set(ran)) == 1 + 4 * (2 + 1 + 1)  # a teacher, and trials of four rows
    assert tuned["runs"] == len(ran)
    for row, found in tuned["points"]["24 labels"].items():
        scores = [np.mean(trial["validation"]) for trial in found["tried"]]
        assert found["chosen"] == found["tried"][int(np.argmax(scores))]["flags"], row

    (table,) = reproduce_all(places, "tested")
    assert len(ran) == len(set(ran))
    correct = {row: [] for row in MAIN}
    for row, found in correct.items():
        chosen = tuned["points"]["24 labels"][row]["chosen"]
        for seed in (0, 1):
            name = f"{row}{study.format_flags(chosen)} s{seed} *".replace(":", "-")
            (folder,) = (tmp_path / "runs" / "folder").glob(name)
            last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
            tested = checkpoints.read_file(folder / "test.pt")
            found.append((tested["predicted"] == tested["labels"]).numpy())
            assert 100 * found[-1].mean() == pytest.approx(last["test_top1"])
            path = [str(folder / "model.pt")]
            again = ensemble.evaluate(path, ensemble.parse(path))["ensemble_top1"]
            assert again == pytest.approx(last["test_top1"], rel=1e-6)
    values = {row: 100 * np.stack(found).mean(axis=1) for row, found in correct.items()}
    for row, cells in estimate({"": values})["points"][""].items():
        assert table["points"]["24 labels"][row]["values"] == cells["values"]
        assert table["points"]["24 labels"][row]["interval"] == cells["interval"]
        packed = unpack(table["correct"]["24 labels"][row], table["images"])
        assert (packed == np.stack(correct[row])).all()
    assert table["seeds"] == [0, 1] and NEAREST in table["points"]["24 labels"]

    (seen,) = reproduce_all(places, "looks of photographs")
    seen = seen["points"]["24 labels"]
    names = {"teacher", "another teacher", "random net", *MAIN}
    assert seen.keys() == names and not seen["teacher"].keys() & set(looks.PATCHES)
    assert_close(seen["attention copy"]["from_mean"], seen["teacher"]["from_mean"])


@pytest.mark.slow
def test_what_is_read_off_runs_is_bounded_by_what_it_must_be(places, ran, tmp_path, monkeypatch):
    monkeypatch.setattr(looks, "IMAGES", 100)
    monkeypatch.setattr(digits, "PLACES", 1)
    usual = {row: tune.record_trials(tune.choose_first(row, tables.DIGITS), {}) for row in MAIN}
    record = dict.fromkeys(jobs.ABOUT) | {"points": {rows.BASE: usual}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "digits-tuning.json").write_text(json.dumps(record))
    places += ["--seeds", "2"]
    found, together = reproduce_all(places, "looks", "ensembles")
    seen = found["points"][rows.BASE]
    for name in seen:
        shares = np.array([seen[name][kind]["mean"] for kind in looks.PATCHES]).sum(axis=0)
        assert_close(shares, np.ones(len(shares)), atol=1e-3, rtol=0)
    for name in ("teacher", "attention copy"):  # all its maps are lent
        assert max(map(abs, seen[name]["divergence"]["mean"])) < 1e-4
    assert min(seen["teacher"]["cka"]["mean"]) > 0.999

    table = together["points"][rows.BASE]
    for pair in ("fine-tuning twice", "fine-tuning + distillation"):
        assert -1 <= table[pair]["error_correlation"]["mean"] <= 1
        assert table[pair]["difference"]["from"] in table


def test_what_the_image_adds_to_a_map_is_what_position_alone_does_not_say():
    p = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64).softmax(dim=-1)
    p[1] = p[1, :1]  # the second layer looks the same way at all images
    mean, uniform = p.mean(dim=1, keepdim=True), torch.full_like(p, 1 / 4)
    added, said = ((p * (p / q).log()).sum(-1).mean(dim=(1, 2, 3)) for q in (mean, uniform))
    found = looks.measure_change(p)
    assert_close(found["of_image"], (added / said).tolist(), atol=1e-9, rtol=0)
    assert found["of_image"][0] > 0.1


def test_patches_are_of_the_kind_whose_ink_they_hold():
    split = digits.Split(2, torch.device("cpu"))
    digit, distractors = (canvas[:30] for canvas in split.layers("test"))
    kinds = looks.find_kinds(digit, distractors, patch=3).argmax(dim=-1)
    for image in range(30):
        for i in range(16):
            y, x = 3 * (i // 4), 3 * (i % 4)
            ink = [c[image, 0, y : y + 3, x : x + 3].sum() > 0 for c in (digit, distractors)]
            assert kinds[image, i] == (0 if ink[0] else 1 if ink[1] else 2)
    assert_close(split.placed("test")[0][:30], torch.maximum(digit, distractors))


@pytest.mark.parametrize(
    "asked",
    [tables.DIGITS, tables.FAIR, tables.CIFAR, tables.SCENES],
    ids=["digits", "fair", "cifar10", "scenes"],
)
def test_every_row_gets_as_many_trials_and_shares_all_that_it_must(asked, tmp_path):
    counts, planner, settings = set(), Planner(asked, tmp_path), {}
    for row in asked.own:
        best = tune.choose_first(row, asked)
        counts.add(sum(len(tune.list_options(row, stage, best, asked)) for stage in range(3)))
    assert len(counts) == 1
    tuned = {row: {"lr": 1e-3} for row in rows.ROWS}
    for row, made in rows.ROWS.items():
        if row not in rows.MISMATCHED and {row, made.tuned_as} & asked.own.keys():
            planned = planner.plan(row, 3, {"distractors": 1}, tuned)
            assert all(set(job.after) <= planned.keys() for job in planned.values())
            settings[row] = list(planned.values())[-1].get_settings()
    usual = settings["fine-tuning"]
    same = "num_labels epochs warmup batch model patch mixup smoothing clip distractors eval_every"
    for row, own in settings.items():
        for key in same.split():
            assert getattr(own, key) == getattr(usual, key), (row, key)
        assert (own.seed if own.subset_seed < 0 else own.subset_seed) == 3, row
    again = settings["fine-tuning again"]
    assert (again.seed, again.teacher) == (1003, usual.teacher)


def test_a_study_of_one_teacher_takes_the_bundled_one(tmp_path, monkeypatch):
    folders = []
    for root in (None, tmp_path / "clone", tmp_path / "moved"):
        monkeypatch.setattr(study, "ROOT", root)
        bundled = root and root / "cifar10.pt"
        planner = Planner(tables.CIFAR, tmp_path, find_bundled=lambda _: bundled)
        *teacher, job = planner.plan("attention copy", 3, {}, {"attention copy": {}}).values()
        expected = bundled or teacher[0].out / "model.pt"
        assert job.get_settings().teacher == str(expected)
        folders.append(job.out)
    assert folders[0] != folders[1] == folders[2]  # a clone that was moved knows its runs
    planner = planner._replace(study=tables.DIGITS)  # which has one for each seed
    assert len(planner.plan("attention copy", 3, {}, {"attention copy": {}})) == 2


RECORDED = [name for name in reproduce.TABLES if (ROOT / "results" / f"{name}.json").exists()]


@pytest.mark.parametrize("name", [n for n in RECORDED if not reproduce.TABLES[n].tunes])
def test_runs_that_differ_lie_in_folders_of_their_own(name):
    table, runner = reproduce.TABLES[name], SimpleNamespace(run=lambda _: None)
    planner = Planner(table.study, Path("runs"))
    tuned = tune.read_tuning(table.study, reproduce.TABLES, ROOT / "results")
    planned, asked = reproduce.train(table, planner, tuned, runner, [1, 2]), {}
    for job in (job for of_rows in planned.values() for row in of_rows.values() for job in row):
        assert asked.setdefault(job.out, job) == job
        job.get_settings()


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own_is_the_run_of_its_script(tmp_path):
    argv = "--data digits --teacher none --epochs 1 --num-labels 50 --device cpu".split()
    outs = {name: ["--out", str(tmp_path / name)] for name in "abc"}
    job = jobs.Job("finetune", [*argv, *outs["a"]], tmp_path / "a")
    broken = jobs.Job("finetune", [*argv, "--batch", "900", *outs["b"]], tmp_path / "b")
    runner = jobs.Runner(1, "test_top1")
    found = runner.run({"a": job})["a"]
    result = finetune.main(finetune.parse([*argv, *outs["c"]]))
    assert found["test_top1"] == result["test_top1"]
    ours, theirs = (read_checkpoint(tmp_path / name / "model.pt").weights for name in "ac")
    assert_close(ours, theirs, rtol=0, atol=0)
    with pytest.raises(Failed, match="b failed: error: --batch 900"):
        runner.run({"b": broken})
    assert job.read_result() and not replace(job, argv=[*job.argv, "--seed", "7"]).has_begun()
    (tmp_path / "a" / "config.json").write_text("[]")
    assert job.read_result() is None and not job.has_begun()


def test_a_teacher_that_is_shipped_is_found_and_checked(places, ran, tmp_path, monkeypatch):
    settings = ship.parse(["digits", *places[:2], places[-1]])
    file = ship.ship("digits", settings, tmp_path / "weights")
    facts = json.loads(file.with_suffix(".json").read_text())
    today = json.loads((ROOT / "weights" / "digits.json").read_text())
    assert facts["for"] == today["for"]
    monkeypatch.setattr(find, "BUNDLED", file.parent)
    asked = attention_copy.parse(["--data", "digits", "--device", "cpu"])
    found = find.find_teacher(asked, data.load(asked))
    assert found.source == str(file) and found.method == "pretrain"
    assert not find.find_bundled(replace(asked, distractors=9))


@pytest.mark.slow
def test_a_run_is_known_by_its_teachers_weights_wherever_they_are(tmp_path):
    teacher = ROOT / "weights" / "digits.pt"
    moved, other = (tmp_path / f"{name}.pt" for name in ("moved", "other"))
    moved.write_bytes(teacher.read_bytes())
    state = checkpoints.read_file(teacher)
    state["model"]["cls_token"] += 1
    checkpoints.save(state, other)
    argv = ["--data", "digits", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    finetune.main(finetune.parse([*argv, "--teacher", str(teacher)]))
    for source, begun in ((teacher, True), (moved, True), (other, False), ("pretrain", False)):
        job = jobs.Job("finetune", [*argv, "--teacher", str(source)], tmp_path / "run")
        assert job.has_begun() == begun


@pytest.mark.slow
def test_runs_end_with_the_process_that_wants_them(tmp_path):
    """Or they would hold their folder against the same command, called again."""
    begin = (
        "import sys; from pathlib import Path; from experiments import jobs\n"
        "out = sys.argv[1]; argv = ['--teacher', 'none', '--device', 'cpu', '--out', out]\n"
        "jobs.Runner(1, '').run({'a': jobs.Job('finetune', argv, Path(out))})"
    )
    out = tmp_path / "run"
    parent = subprocess.Popen([sys.executable, "-c", begin, str(out)], cwd=ROOT)
    wait_until(lambda: (out / "last.pt").exists())
    parent.kill()
    parent.wait()
    wait_until(lambda: "stopped by a signal" in (out / "output.txt").read_text())
    assert not (out / "model.pt").exists()


def wait_until(true, seconds=60):
    for _ in range(10 * seconds):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("it never came")


def test_a_damaged_record_is_named_where_it_is_used(places, tmp_path, monkeypatch):
    path = tmp_path / "results" / "digits-tuning.json"
    path.parent.mkdir()
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    for text in ('{"points": {', '{"points": {}}', "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"digits-tuning\.json is damaged"):
            reproduce.main(reproduce.parse(["digits-clutter", *places]))
        assert "damaged" in reproduce.list_tables() and "cifar10-main" in reproduce.list_tables()


@pytest.mark.parametrize("name", [name for name in reproduce.TABLES if name in RESULTS])
def test_records_are_of_todays_rows_and_can_be_drawn(name, tmp_path):
    record, table = RESULTS[name], reproduce.TABLES[name]
    picture = tmp_path / f"{name}.png"
    figures.draw_record(table, record, picture)
    assert picture.exists() == (not table.tunes and not table.find)
    if not table.find:
        found = {point: set(of_rows) for point, of_rows in record["points"].items()}
        assert found == {point: set(table.rows) for point in table.points}
        assert list(record.get("contrasts", {})) == list(table.contrasts)


@pytest.mark.parametrize("page", report.PAGES)
def test_the_tables_of_a_page_are_those_of_the_records(page):
    text = (ROOT / page).read_text()
    assert report.fill_tables(text, ROOT / "results") == text


def test_the_base_task_is_what_the_rule_chose():
    """The least clutter at which fine-tuning leads by 2 points, on validation images."""

    def get_best(point: str, row: str) -> float:
        tried = RESULTS["digits-tuning"]["points"][point][row]["tried"]
        return max(np.mean(trial["validation"]) for trial in tried)

    rivals = (*rows.PROBE, NEAREST)
    leads = {p: get_best(p, "fine-tuning") - max(get_best(p, r) for r in rivals) for p in CLUTTER}
    assert next(point for point, lead in leads.items() if lead >= 2) == rows.BASE


@pytest.mark.parametrize("row", MAIN)
@pytest.mark.parametrize("table, name, point", [
    ("fair-tuning", "digits", rows.BASE), ("scenes-tuning", "scenes", "pointer"),
])  # fmt: skip
def test_the_defaults_of_the_scripts_are_what_tuning_chose(table, name, point, row):
    chosen = dict(RESULTS[table]["points"][point][row]["chosen"])
    none = ["--teacher", "none"] if MAIN[row].teacher == "none" else []
    usual = get_values(jobs.load(MAIN[row].script).parse(["--data", name, *none]))
    assert usual["blr"] * usual["batch"] / 256 == pytest.approx(chosen.pop("lr"))
    if "layers" in chosen:
        assert parse_layers(usual["layers"], 4) == parse_layers(chosen.pop("layers"), 4)
    assert {name: usual[name] for name in chosen} == chosen
