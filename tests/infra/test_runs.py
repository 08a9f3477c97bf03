"""Runs of the scripts: killed and resumed, on one process and on two, failing without harm."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attention_copy
import attention_distill
import data
import finetune
import train
from common import checkpoints, runs
from common.hardware import has_fast_bf16

ROOT = Path(__file__).parents[2]
SHORT = "--teacher random --epochs 6 --num-labels 300 --batch 50 --eval-every 3 --ema 0.9".split()
DIGITS = [*SHORT, "--drop-path", "0.2"]  # six steps an epoch
QUICK = "--data digits --teacher none --model nano --num-labels 100 --epochs 2 --mixup 1".split()
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
LITTLE_MEMORY = """
import torch
import attention_distill as script
from common import launch
honest = script.loss
def loss(net, images, *rest, **bound):
    if len(images) > (20 if launch.rank() == 0 else 7):
        raise torch.OutOfMemoryError("CUDA out of memory")
    return honest(net, images, *rest, **bound)
script.loss = loss
launch.run(script.main, script.parse)
"""


def weights(out, name="last.pt"):
    return torch.load(Path(out) / name, weights_only=True, map_location="cpu")


def start(script, *argv, launcher=(sys.executable,)):
    # A restarted gloo group hangs now and then on its old rendezvous if that is shared: #135712.
    env = dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    env |= dict(MPLBACKEND="module://a_notebooks_own")
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env)
    return subprocess.Popen([*launcher, str(ROOT / script), *map(str, argv)], **how)


def run_here(script, *argv):
    return script.main(script.parse(list(map(str, argv))))


def log_of(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row | {"seconds": 0, "images_per_s": 0} for row in rows]


def assert_close(ours, theirs):
    for net in (ours, theirs):
        for key in net:
            if key.endswith("qkv.bias"):  # softmax ignores a key's: Adam blows up rounding noise
                net[key].chunk(3)[1].zero_()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def assert_same_run(*outs):
    for name, part in (("last.pt", "net"), ("last.pt", "average"), ("model.pt", "model")):
        nets = (weights(out, name)[part] for out in outs)
        torch.testing.assert_close(*nets, rtol=0, atol=0)


def wait_for_step(run, out, beyond):
    """Blocks until a checkpoint beyond a step, in the middle of an epoch, is there."""
    while run.poll() is None:
        if (out / "last.pt").exists() and (step := weights(out)["step"]) > beyond and step % 6:
            return
    raise AssertionError("the run ended before its time: " + run.communicate()[1])


def test_a_run_is_named_after_its_public_teacher():
    public = {"x.in1k=a/b.pt": "x.in1k", "a/x.in1k.safetensors": "x.in1k", "a/x.tar": "x"}
    for teacher, name in (public | {"runs/a/model.pt": "nano", "mae": "nano"}).items():
        settings = finetune.parse(["--model", "nano", "--teacher", teacher])
        assert runs.get_folder(settings) == Path(f"runs/finetune-scenes-{name}-s0")


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bits(tmp_path, failing):
    """And meanwhile no other process may train in the folder."""
    argv, whole = [*DIGITS, "--out", tmp_path, "--resume"], Path("whole")
    run_here(attention_distill, *DIGITS, "--out", whole)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup ignores it
    for kill, beyond in ((signal.SIGKILL, 3), (signal.SIGINT, 14)):
        run = start("attention_distill.py", *argv, "--save-every", 0)
        wait_for_step(run, tmp_path, beyond)
        run.send_signal(signal.SIGSTOP)  # or it may end first
        failing(attention_distill, argv, "another process is training in")
        run.send_signal(kill)
        run.send_signal(signal.SIGCONT)
        run.communicate(timeout=60)
        assert run.returncode == (-kill if kill == signal.SIGKILL else 128 + kill)
    assert 14 < weights(tmp_path)["step"] < 36
    result = run_here(attention_distill, *argv)
    assert_same_run(tmp_path, whole)
    rows = log_of(tmp_path)
    assert rows[-1]["test_top1"] == result["test_top1"]
    assert rows == [pytest.approx(row) for row in log_of(whole)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The second has less memory. Both find that 7 of their 25 images fit at a time."""
    out = tmp_path_factory.mktemp("two")
    (out / "driver.py").write_text(LITTLE_MEMORY)
    run = start(out / "driver.py", *SHORT, "--out", out / "run", launcher=TORCHRUN)
    text, errors = run.communicate(timeout=120)
    assert run.returncode == 0 and text.count("test top-1") == 1, errors
    assert "7 images at a time" in " ".join(text.split())
    return out / "run"


@pytest.mark.slow
def test_two_ranks_and_smaller_pieces_train_to_the_same_weights(two_ranks, tmp_path):
    run_here(attention_distill, *SHORT, "--micro-batch", 50, "--out", tmp_path)
    for part in ("net", "average"):
        assert_close(weights(two_ranks)[part], weights(tmp_path)[part])
    row, other = log_of(tmp_path)[-1], log_of(two_ranks)[-1]
    for key in ("class", "loss", "kl", "gradient_norm"):
        assert row[key] == pytest.approx(other[key], rel=1e-3)
    assert row["test_top1"] == pytest.approx(other["test_top1"], abs=0.11)  # of 2,000 images


@pytest.mark.slow
def test_a_lost_rank_is_restarted_and_the_run_goes_on(two_ranks, tmp_path):
    argv = [*SHORT, "--micro-batch", "7", "--resume", "--out", tmp_path, "--save-every", 0]
    run = start("attention_distill.py", *argv, launcher=(*TORCHRUN, "--max-restarts=2"))
    wait_for_step(run, tmp_path, 8)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    text, errors = run.communicate(timeout=120)
    assert run.returncode == 0 and "resuming from step" in text, errors
    assert_same_run(tmp_path, two_ranks)


def test_accuracy_counts_each_image_once():
    images = data.load(finetune.parse(["--data", "digits"])).test

    def predict(net, batch):  # a guess by the place of the brightest pixel
        return torch.nn.functional.one_hot(batch.flatten(1).argmax(1) // 15, 10)

    predicted, labels = train.predict_classes(predict, torch.nn.Linear(1, 1), images, "off", 7)
    inputs, expected = (torch.cat(x) for x in zip(*images.in_order(1), strict=True))
    guesses = torch.stack([x.flatten().argmax() // 15 for x in inputs])
    assert torch.equal(predicted, guesses) and torch.equal(labels, expected)


@pytest.mark.slow
@pytest.mark.parametrize("script", [attention_copy, attention_distill])
def test_mixed_precision_and_one_graph_train_close_to_float32(script, tmp_path, monkeypatch):
    compile, rows, one = torch.compile, {}, dict(backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda call, mode: compile(call, **one))
    for name, more in {"float32": "", "bf16": "--amp bf16", "compiled": "--compile on"}.items():
        argv = [*QUICK, *"--teacher random --layers 0 --drop-path 0.2".split(), *more.split()]
        rows[name] = run_here(script, *argv, "--out", tmp_path / name)["loss"]
    assert rows["compiled"] == pytest.approx(rows["float32"], rel=1e-3)
    assert rows["bf16"] == pytest.approx(rows["float32"], rel=0.03)
    assert rows["bf16"] != rows["float32"]


@pytest.mark.parametrize("flags, fast", [("avx512_bf16", False), ("avx512_bf16 amx_bf16", True)])
def test_a_cpu_has_bf16_only_where_it_is_faster_than_float32(flags, fast, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: f"flags: avx512f {flags} sse")
    assert has_fast_bf16("cpu") == fast and not has_fast_bf16("mps")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, failing, monkeypatch):
    calls, honest, one = [], finetune.loss, torch.tensor(1.0)

    def explode(*step, **bound):
        assert step[2].ndim == 2  # mixed labels, even where it is tried how many images fit
        calls.append(honest(*step, **bound)[0])
        return calls[-1] * (float("nan") if len(calls) > 3 else 1), {"loss": one - 2, "mine": one}

    monkeypatch.setattr(finetune, "loss", explode)  # in the second epoch, of two steps
    failing(finetune, [*QUICK, "--out", tmp_path], "no longer finite", "learning rate", code=1)
    state = weights(tmp_path)
    assert state["step"] == 2 and all(v.isfinite().all() for v in state["net"].values())
    assert not (tmp_path / "model.pt").exists()
    assert log_of(tmp_path)[0]["loss"] > 0 and log_of(tmp_path)[0]["mine"] == 1
    for bug in (lambda: int("one"), lambda: one, lambda: torch.nn.functional.dropout(one, 2.0)):
        monkeypatch.setattr(finetune, "loss", lambda *_, bug=bug, **__: bug())
        with pytest.raises((ValueError, AssertionError)):  # with its traceback: no wrong input
            failing(finetune, [*QUICK, "--out", tmp_path / "anew"])  # nothing is there yet


def test_a_full_disk_fails_the_run_and_keeps_the_last_checkpoint(tmp_path, failing, monkeypatch):
    before = []

    def fill_disk(row, *_):
        if row["epoch"] == 2:
            before.append((tmp_path / "last.pt").read_bytes())
            (tmp_path / f"last.pt.{os.getpid()}.part").symlink_to("/dev/full")  # no write works

    monkeypatch.setattr(train, "show_row", fill_disk)
    words = "could not write", "No space left", "intact"
    failing(finetune, [*QUICK, "--out", tmp_path], *words, code=1)
    assert (tmp_path / "last.pt").read_bytes() == before[0] and weights(tmp_path)["step"] == 2


def test_an_interrupted_save_is_an_interruption_and_spoils_nothing(tmp_path, monkeypatch):
    class Interrupted(io.FileIO):
        def write(self, part):
            if self.tell():  # in the middle: torch.save reports a RuntimeError
                raise KeyboardInterrupt
            return super().write(part)

    checkpoints.save({"x": torch.ones(3)}, path := tmp_path / "x.pt")
    monkeypatch.setattr(checkpoints, "open", lambda path, _: Interrupted(path, "w"), raising=False)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save({"x": torch.zeros(3)}, path)
    assert [*tmp_path.iterdir()] == [path] and checkpoints.read_file(path)["x"].all()


@pytest.mark.slow
def test_another_run_is_neither_spoiled_nor_continued(tmp_path, failing):
    """One of other settings, method, classes, images or teacher: each is named."""
    argv, last = [*DIGITS, *"--epochs 1 --model nano --out".split(), tmp_path], tmp_path / "last.pt"
    run_here(attention_distill, *argv)
    kept, state = last.read_bytes(), weights(tmp_path)
    failing(attention_distill, argv, "already holds a run")
    failing(attention_distill, [*argv, "--resume", "--blr", "0.5"], "blr was 0.064, now 0.5")
    failing(attention_copy, [*argv, "--resume"], "method was distill, now copy")
    assert last.read_bytes() == kept
    for name, value in dict(class_names=["a"], images=99, teacher_weights="0").items():
        torch.save(state | {"run": state["run"] | {name: value}}, last)
        failing(attention_distill, [*argv, "--resume"], f"{name} was ", "--overwrite")


@pytest.mark.slow
def test_a_teacher_is_known_by_its_weights_wherever_it_lies(tmp_path, teacher, small, failing):
    argv, mine = [*small, "--out", tmp_path / "run", "--teacher"], tmp_path / "moved.pt"
    run_here(attention_copy, *argv, teacher)
    run_here(attention_copy, *argv, shutil.copy(teacher, mine), "--resume")
    found = weights(tmp_path, "moved.pt")
    found["model"]["cls_token"] += 1
    found["architecture"]["mean"] = (0.1,) * 3
    torch.save(found, mine)
    failing(attention_copy, [*argv, mine, "--resume"], "normalization was", "teacher_weights was ")
    failing(attention_copy, [*argv, mine, "--overwrite", "--out", tmp_path], "lies in --out")
    assert mine.exists()


def test_starting_over_leaves_nothing_of_the_run_before(tmp_path, monkeypatch):
    run_here(finetune, *QUICK, "--out", tmp_path)
    again = [*QUICK, "--blr", "0.5", "--overwrite", "--out", tmp_path]
    for name, left in (("__init__", {*runs.FILES}), ("train_step", {"config.json", "log.jsonl"})):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(train.Learner, name, lambda *_: 1 / 0)  # before and after it begins
            run_here(finetune, *again)
        assert {path.name for path in tmp_path.iterdir()} == {".lock", *left}


def test_images_and_runs_are_kept_apart(photos, small, tmp_path, failing, monkeypatch):
    """A run among the images would be a class. Nothing is written before it is refused."""
    root = shutil.copytree(photos / "train", tmp_path / "images")
    before, argv = sorted(root.rglob("*")), [*small, "--num-labels", "0", "--data-dir"]
    monkeypatch.chdir(root)  # in its runs/ a teacher would be made
    for more in ("{0} --teacher none --out red", "{0} --out ../images/new", ". --out ../run"):
        failing(finetune, [*argv, *more.format(root).split()], "outside --data-dir")
    assert sorted(root.rglob("*")) == before


def test_processes_that_resume_from_different_steps_are_told(tmp_path, failing, monkeypatch):
    monkeypatch.setattr(train, "collect", lambda mine: [mine, mine + 1])  # on disks of their own
    failing(finetune, [*QUICK, "--out", tmp_path], "different steps", code=1)
