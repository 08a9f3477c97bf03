"""Runs of the scripts: killed and resumed, on one process and on two, and failing without spoiling what is saved."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import attention_copy
import attention_distill
import finetune
import train

ROOT = Path(__file__).parent.parent
DIGITS = ["--teacher", "random", "--epochs", "6", "--warmup", "1", "--ema", "0.9", "--labels", "300", "--batch", "50",
          "--drop-path", "0.2", "--eval-every", "3"]  # fmt: skip


def weights(out, name="last.pt"):
    return torch.load(Path(out) / name, weights_only=True)


def start(script, *argv, launcher=(sys.executable,)):
    # A restarted gloo group hangs now and then on its old rendezvous if that is shared (pytorch/pytorch#135712).
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen([*launcher, str(ROOT / script), *map(str, argv)], stderr=subprocess.PIPE, text=True,
                            stdout=subprocess.PIPE, env=env)  # fmt: skip


def assert_same(a, b, exact=True):
    assert a.keys() == b.keys()
    for key in a:
        if exact:
            assert torch.equal(a[key], b[key]), key
        else:
            ours, theirs = a[key].clone(), b[key].clone()
            if key.endswith("qkv.bias"):  # softmax ignores a key's bias: its gradient is rounding noise, which Adam blows up
                width = len(ours) // 3
                ours[width : 2 * width] = theirs[width : 2 * width] = 0
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=key)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    attention_distill.main(attention_distill.options([*DIGITS, "--out", str(out)]))
    return out


def wait_for_step(out, beyond):
    """Blocks until a checkpoint beyond a step, in the middle of an epoch, is there."""
    deadline = time.time() + 60
    while time.time() < deadline:
        if (out / "last.pt").exists():
            step = weights(out)["step"]
            if step > beyond and step % 6:
                return step
        time.sleep(0.002)
    raise AssertionError("no checkpoint within a minute")


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_gives_the_same_bits(kill, uninterrupted, tmp_path):
    for beyond in (3, 14):  # killed twice; --save-every 0 checkpoints each step, so it dies in the middle of an epoch
        run = start("attention_distill.py", *DIGITS, "--out", tmp_path, "--save-every", 0, "--resume")
        wait_for_step(tmp_path, beyond)
        run.send_signal(kill)
        text, _ = run.communicate(timeout=60)
        assert run.returncode == (-kill if kill == signal.SIGKILL else 128 + kill)
        assert kill == signal.SIGKILL or "--resume goes on" in text
    assert 14 < weights(tmp_path)["step"] < 36
    result = attention_distill.main(attention_distill.options([*DIGITS, "--out", str(tmp_path), "--resume"]))
    ours, theirs = weights(tmp_path), weights(uninterrupted)
    for part in ("net", "average"):
        assert_same(ours[part], theirs[part])
    assert_same(weights(tmp_path, "model.pt")["model"], weights(uninterrupted, "model.pt")["model"])
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (tmp_path, uninterrupted)]
    for a, b in zip(*logs, strict=True):
        assert {k: a[k] for k in a if k not in ("seconds", "images_per_s")} == pytest.approx(
            {k: b[k] for k in b if k not in ("seconds", "images_per_s")}
        )
    assert result["test_top1"] == logs[1][-1]["test_top1"]


@pytest.mark.parametrize("micro_batch", [0, 10])
def test_two_ranks_train_to_the_weights_of_one(micro_batch, tmp_path):
    same = [*DIGITS[:-4], "--drop-path", "0", "--epochs", "4", "--eval-every", "4"]
    alone = attention_distill.main(attention_distill.options([*same, "--out", str(tmp_path / "one")]))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run = start("attention_distill.py", *same, "--out", tmp_path / "two", "--micro-batch", micro_batch, launcher=launcher)
    text, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    for part in ("net", "average"):
        assert_same(weights(tmp_path / "one")[part], weights(tmp_path / "two")[part], exact=False)
    rows = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1]) for name in ("one", "two")]
    for key in ("class", "attention", "gradient"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-3)
    assert rows[0]["test_top1"] == pytest.approx(rows[1]["test_top1"], abs=0.11)  # at most two of 2,000 images on an edge
    assert alone["test_top1"] == rows[0]["test_top1"] and text.count("test top-1") == 1


def test_a_lost_rank_is_restarted_and_the_run_goes_on(tmp_path):
    same = [*DIGITS, "--micro-batch", "10", "--resume"]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2")
    run = start("attention_distill.py", *same, "--out", tmp_path / "whole", launcher=launcher)
    assert run.wait(timeout=120) == 0
    run = start("attention_distill.py", *same, "--out", tmp_path / "lost", "--save-every", 0, launcher=launcher)
    wait_for_step(tmp_path / "lost", 8)
    ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    text, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert "going on from step" in text
    for name, part in (("last.pt", "net"), ("last.pt", "average"), ("model.pt", "model")):
        assert_same(weights(tmp_path / "lost", name)[part], weights(tmp_path / "whole", name)[part])


def test_accuracy_counts_each_image_once(small, tmp_path):
    import data

    args = finetune.options(["--batch", "7"])
    images = data.load(args, torch.device("cpu"))
    asked = []

    def predict(net, batch):  # right on the images whose brightest pixel is in the upper half
        asked.append(len(batch))
        return torch.nn.functional.one_hot(((batch.flatten(1).argmax(1) < 72) * 3).long(), 10)

    measured = train.accuracy(predict, torch.nn.Linear(1, 1), images.test, args)
    inputs, labels = (torch.cat(x) for x in zip(*images.test.plainly(1), strict=True))
    expected = sum((3 if x.flatten().argmax() < 72 else 0) == y for x, y in zip(inputs, labels.tolist(), strict=True))
    assert sum(asked) == len(labels) == 2000
    assert measured == pytest.approx(100 * expected / 2000)


def test_gradient_accumulation_changes_nothing(tmp_path, uninterrupted):
    same = [a if a != "0.2" else "0" for a in DIGITS]
    nets = []
    for micro_batch in ("0", "17"):
        out = tmp_path / micro_batch
        attention_distill.main(attention_distill.options([*same, "--out", str(out), "--micro-batch", micro_batch]))
        nets.append(weights(out)["net"])
    assert_same(*nets, exact=False)


def test_mixed_precision_and_compile_train_close_to_float32(tmp_path):
    rows = {}
    for name, extra in {"float32": [], "bf16": ["--amp", "bf16"], "compiled": ["--compile", "on"]}.items():
        args = finetune.options(["--teacher", "none", "--epochs", "4", "--warmup", "1", "--eval-every", "4",
                                 "--out", str(tmp_path / name), *extra])  # fmt: skip
        rows[name] = finetune.main(args)["class"]
    assert rows["compiled"] == pytest.approx(rows["float32"], rel=1e-3)
    assert rows["bf16"] == pytest.approx(rows["float32"], rel=0.03)
    assert rows["bf16"] != rows["float32"]


@pytest.mark.parametrize("script", [attention_copy, attention_distill])
def test_a_step_compiles_as_one_graph(script, monkeypatch, tmp_path):
    """Without a break, so that CUDA graphs can hold the whole of it. The backend that only traces is as strict, and fast."""
    nets = []
    for mode in ("off", "on"):
        monkeypatch.setattr(train.Step, "compile", lambda step, mode: torch.nn.Module.compile(step, backend="aot_eager",
                                                                                             fullgraph=True))  # fmt: skip
        torch.compiler.reset()
        out = tmp_path / mode
        script.main(script.options([*DIGITS[:2], "--epochs", "2", "--warmup", "1", "--labels", "100", "--batch", "50",
                                    "--compile", mode, "--out", str(out)]))  # fmt: skip
        nets.append(weights(out)["net"])
    assert_same(*nets, exact=False)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, failing, monkeypatch):
    argv = ["--teacher", "none", "--labels", "300", "--epochs", "3", "--warmup", "0", "--out", tmp_path]
    calls, honest = [], finetune.loss

    def explodes(*args):
        calls.append(1)
        return {k: v * (float("nan") if len(calls) > 4 else 1) for k, v in honest(*args).items()}

    monkeypatch.setattr(finetune, "loss", explodes)
    code, line = failing(finetune, [*argv, "--batch", "100"])  # 3 steps per epoch: the second epoch explodes
    assert code == 1 and "no longer finite" in line and "--lr" in line
    state = weights(tmp_path)
    assert state["step"] == 3 and all(torch.isfinite(v).all() for v in state["net"].values())
    assert not (tmp_path / "model.pt").exists()


def test_a_full_disk_fails_the_run_and_keeps_the_last_checkpoint(tmp_path, failing, monkeypatch):
    argv = ["--teacher", "none", "--labels", "300", "--epochs", "2", "--warmup", "0", "--out", tmp_path]
    before = []

    def report(row, *_):
        if row["epoch"] == 1:
            return
        before.append((tmp_path / "last.pt").read_bytes())
        (tmp_path / "last.part").symlink_to("/dev/full")  # every write there fails as on a full disk

    monkeypatch.setattr(train, "report", report)
    code, line = failing(finetune, argv)
    assert code == 1 and "could not write" in line and "No space left" in line and "intact" in line
    assert (tmp_path / "last.pt").read_bytes() == before[0] and weights(tmp_path)["step"] == 6


def test_a_run_is_not_spoiled_by_another(tmp_path, failing, uninterrupted):
    kept = (uninterrupted / "last.pt").read_bytes()
    for argv, words in ((DIGITS, "already holds a run"), ([*DIGITS, "--resume", "--lr", "0.5"], ", now 0.5")):
        code, line = failing(attention_distill, [*argv, "--out", uninterrupted])
        assert code == 2 and words in line
    assert (uninterrupted / "last.pt").read_bytes() == kept
    (tmp_path / "last.pt").write_bytes(kept[: len(kept) // 2])
    code, line = failing(attention_distill, [*DIGITS, "--resume", "--out", tmp_path])
    assert code == 2 and "damaged" in line
