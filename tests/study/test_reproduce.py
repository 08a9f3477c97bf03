"""The study: a figure is what its runs found, and a killed reproduction repeats none of them."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import ensemble
import finetune
import pretrain
from common import checkpoints, runs
from common.launch import Failed
from common.settings import get_values, parse_layers
from study import engine, figures, jobs, looks, report, reproduce, rows, tables, tune
from study.engine import Planner
from study.estimates import estimate, unpack
from study.rows import MAIN
from teachers.load import read_checkpoint

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "study" / "results"
RESULTS = {path.stem: json.loads(path.read_text()) for path in KEPT.glob("*.json")}
ASKED = [table for table in tables.TABLES.values() if table.study.own]
SHARED = {"data": "folder", "model": "micro", "patch": 4, "image_size": 16, "workers": 0}
AT_24 = {"24 labels": {}}
STUDY = engine.Study(
    rows.ROWS, SHARED | {"num_labels": 24, "epochs": 1, "batch": 8}, {"epochs": 1}, tuple(SHARED),
    seeds=(100,), rates=(1e-3, 2e-3), decays=(0.05, 0.5),
    own={row: (name, values[:2]) for row in MAIN for name, values in [tables.OWN[row]]},
)  # fmt: skip
TABLES = {
    "tuned": engine.Table("", STUDY, tuple(MAIN), AT_24, tunes=True),
    "tested": engine.Table("", STUDY, tuple(MAIN), AT_24),
    "scenes-looks": tables.TABLES["scenes-looks"],
    "scenes-tuning": tables.TABLES["scenes-tuning"],
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
        return job.read_result()

    monkeypatch.setattr(jobs.Runner, "start_process", start_process)
    monkeypatch.setattr(reproduce, "TABLES", TABLES)
    return names


def reproduce_all(places, *names) -> list[dict]:
    settings = reproduce.parse([*names, *places])
    reproduce.main(settings)
    return [json.loads((Path(settings.results) / f"{name}.json").read_text()) for name in names]


@pytest.mark.slow
def test_validation_chooses_settings_and_a_table_is_what_runs_found(places, ran, photos, tmp_path):
    places += ["--data-dir", str(photos), "--seeds", "2"]
    with pytest.raises(ValueError, match="has no settings yet: first"):
        reproduce_all(places, "tested")
    ran.append("fail")
    with pytest.raises(Failed):  # after five runs
        reproduce_all(places, "tuned")
    ran.remove("fail")
    (tuned,) = reproduce_all(places, "tuned")  # a teacher, and trials of four rows
    assert tuned["runs"] == len(ran) == len(set(ran)) == 1 + 4 * (2 + 1 + 1)
    for row, found in tuned["points"]["24 labels"].items():
        scores = [np.mean(trial["validation"]) for trial in found["tried"]]
        assert found["chosen"] == found["tried"][int(np.argmax(scores))]["flags"], row
    (table,) = reproduce_all(places, "tested")
    assert [table] == reproduce_all([*places, "--seeds", "1"], "tested")  # a trial leaves it alone
    assert len(ran) == len(set(ran))
    correct = {row: [] for row in MAIN}
    for row, found in correct.items():
        chosen = tuned["points"]["24 labels"][row]["chosen"]
        for seed in (0, 1):
            name = f"{row}{engine.format_flags(chosen)} s{seed} *".replace(":", "-")
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
        assert (packed == np.stack(correct[row])).all() and table["seeds"] == [0, 1]


@pytest.mark.slow
def test_a_copy_student_looks_where_its_teacher_looks(places, ran, tmp_path, monkeypatch):
    monkeypatch.setattr(looks, "IMAGES", 100)
    chosen = RESULTS["scenes-tuning"]["points"]["pointer"]
    path = tmp_path / "results" / "scenes-tuning.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"points": {"pointer": chosen}}))
    (found,) = reproduce_all([*places, "--seeds", "1"], "scenes-looks")
    seen = found["points"]["pointer"]
    for what in ("of_image", "from_centre"):
        assert_close(seen["attention copy"][what]["mean"], seen["teacher"][what]["mean"])


def test_what_the_image_adds_to_a_map_is_what_position_alone_does_not_say():
    p = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64).softmax(dim=-1)
    p[1] = p[1, :1]  # the second layer looks the same way at all images
    mean = p.mean(dim=1, keepdim=True).expand_as(p)
    least, most = (looks.entropy(maps).mean(dim=(1, 2, 3)) for maps in (p, mean))
    found, expected = looks.measure_change(p), ((most - least) / (np.log(4) - least)).tolist()
    assert_close(found, expected, atol=1e-9, rtol=0)
    learned = [looks.measure_learned(q, p)[0] for q in (p, mean, (p + mean) / 2)]
    assert learned[:2] == pytest.approx([1, 0]) and 0.5 < learned[2] < 1 and found[0] > 0.1


@pytest.mark.parametrize("asked", list({t.study.base["data"]: t.study for t in ASKED}.values()))
def test_every_row_gets_as_many_trials_and_shares_all_that_it_must(asked, tmp_path):
    counts, planner, settings = set(), Planner(asked, tmp_path), {}
    for row in asked.own:
        best = tune.choose_first(row, asked)
        counts.add(sum(len(tune.list_options(row, stage, best, asked)) for stage in range(3)))
    assert len(counts) == 1
    tuned = {row: {"lr": 1e-3} for row in rows.ROWS}
    for row, made in rows.ROWS.items():
        if {row, made.tuned_as} & asked.own.keys():
            planned = planner.plan(row, 3, {"distractors": 1}, tuned)
            assert all(set(job.after) <= planned.keys() for job in planned.values())
            settings[row] = list(planned.values())[-1].get_settings()
    usual = settings["from scratch"]
    same = "num_labels epochs warmup batch model patch mixup smoothing clip distractors eval_every"
    for row, own in settings.items():
        for key in same.split():
            assert getattr(own, key) == getattr(usual, key), (row, key)
        assert own.seed == 3, row


RECORDED = [name for name in reproduce.TABLES if (KEPT / f"{name}.json").exists()]


@pytest.mark.parametrize("name", [n for n in RECORDED if not reproduce.TABLES[n].tunes])
def test_runs_that_differ_lie_in_folders_of_their_own(name):
    table = reproduce.TABLES[name]
    tuned, asked = tune.read_tuning(table.study, reproduce.TABLES, KEPT), {}
    planned, _ = reproduce.plan(table, Planner(table.study, Path("runs")), tuned, [1, 2])
    for job in planned.values():
        assert asked.setdefault(job.out, job) == job
        settings = job.get_settings()
        assert job.script != "pretrain" or not settings.given & pretrain.UNUSED[settings.target]


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own_is_the_run_of_its_script(tmp_path):
    """It is known by its settings and its teacher's weights, wherever these lie."""
    teacher = ROOT / "weights" / "digits.pt"
    argv = f"--data digits --teacher {teacher} --epochs 1 --num-labels 50 --device cpu".split()
    outs = {name: ["--out", str(tmp_path / name)] for name in "abc"}
    job = jobs.Job("finetune", [*argv, *outs["a"]], tmp_path / "a")
    broken = jobs.Job("finetune", [*argv, "--batch", "900", *outs["b"]], tmp_path / "b")
    runner = jobs.Runner(1, "test_top1")
    found = runner.run({"a": job})["a"]
    result = finetune.main(finetune.parse([*argv, *outs["c"]]))
    assert found["test_top1"] == result["test_top1"]
    ours, theirs = (read_checkpoint(tmp_path / name / "model.pt").weights for name in "ac")
    assert_close(ours, theirs, rtol=0, atol=0)
    with pytest.raises(Failed, match=r"b failed \(2\): error: --batch 900"):
        runner.run({"b": broken})
    moved, other = (tmp_path / f"{name}.pt" for name in ("moved", "other"))
    moved.write_bytes(teacher.read_bytes())
    state = checkpoints.read_file(teacher)
    state["model"]["cls_token"] += 1
    checkpoints.save(state, other)
    for name, value, begun in (
        ("--teacher", moved, True), ("--teacher", other, False), ("--teacher", "pretrain", False),
        ("--seed", 7, False), ("--data-dir", "elsewhere", False),
    ):  # fmt: skip
        assert replace(job, argv=[*job.argv, name, str(value)]).has_begun() == begun
    assert job.read_result()
    (tmp_path / "a" / "config.json").write_text("[]")
    assert job.read_result() is None and not job.has_begun()


@pytest.mark.slow
def test_runs_end_with_the_process_that_wants_them(tmp_path):
    """Or they would hold their folder against the same command, called again."""
    begin = (
        "import sys; from pathlib import Path; from study import jobs\n"
        "out = sys.argv[1]; argv = ['--teacher', 'none', '--device', 'cpu', '--out', out]\n"
        "jobs.Runner(1, '').run({'a': jobs.Job('finetune', argv, Path(out))})"
    )
    out = tmp_path / "run"
    parent = subprocess.Popen([sys.executable, "-c", begin, str(out)], cwd=ROOT)
    while not (out / "last.pt").exists():
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    with runs.lock(out, wait=True):  # until the run has ended, or is done
        assert parent.wait() and not (out / "model.pt").exists()


@pytest.mark.parametrize("name", [name for name in reproduce.TABLES if name in RESULTS])
def test_records_are_of_todays_rows_and_can_be_drawn(name, tmp_path):
    record, table = RESULTS[name], reproduce.TABLES[name]
    picture = tmp_path / f"{name}.png"
    figures.draw_record(table, record, picture)
    assert picture.exists() == (not table.tunes and not table.find)
    if not table.find:
        found = {point: set(of_rows) for point, of_rows in record["points"].items()}
        asked = {point: table.fewer.get(point, (table.rows,))[0] for point in table.points}
        assert found == {point: set(some) for point, some in asked.items()}
        assert list(record.get("contrasts", {})) == list(table.contrasts)


@pytest.mark.parametrize("page", report.PAGES)
def test_the_tables_of_a_page_are_those_of_the_records(page):
    text = (ROOT / page).read_text()
    assert report.fill_tables(text, KEPT) == text


@pytest.mark.parametrize("row", MAIN)
@pytest.mark.parametrize("table, name, point, depth", [
    ("fair-tuning", "digits", rows.BASE, 4),
    ("scenes-steps-tuning", "scenes", "100 scenes, 300 steps", 4),
    ("why-cifar10-tuning", "cifar10", "5,000 labels", 6),
])  # fmt: skip
def test_the_defaults_of_the_scripts_are_what_tuning_chose(table, name, point, depth, row):
    chosen = dict(RESULTS[table]["points"][point][row]["chosen"])
    none = ["--teacher", "none"] if MAIN[row].teacher == "none" else []
    usual = get_values(jobs.load(MAIN[row].script).parse(["--data", name, *none]))
    assert usual["blr"] * usual["batch"] / 256 == pytest.approx(chosen.pop("lr"))
    if "layers" in chosen:
        assert parse_layers(usual["layers"], depth) == parse_layers(chosen.pop("layers"), depth)
    assert {name: usual[name] for name in chosen} == chosen
