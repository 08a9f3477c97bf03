"""Runs of the scripts: killed and resumed, on one process and on two, failing without harm."""

from launch import Failed

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import attention_copy
import attention_distill
import checkpoints
import data
import finetune
import learner
import pictures
import pretrain
import progress
import runs
import train
from settings import Settings

ROOT = Path(__file__).parent.parent
SHORT = "--teacher random --epochs 6 --warmup 1 --num-labels 300 --batch 50 --eval-every 3".split()
SAME = [*SHORT, "--ema", "0.9"]  # whatever the number of processes
DIGITS = [*SAME, "--drop-path", "0.2"]  # six steps an epoch
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def weights(out, name="last.pt"):
    return torch.load(Path(out) / name, weights_only=True, map_location="cpu")


def start(script, *argv, launcher=(sys.executable,), **how):
    # A restarted gloo group hangs now and then on its old rendezvous if that is shared: #135712.
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command, pipe = [*launcher, str(ROOT / script), *map(str, argv)], subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, **how)


def run_here(script, *argv):
    return script.main(script.parse(list(map(str, argv))))


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same(a, b, exact=True):
    assert a.keys() == b.keys()
    for key in a:
        if exact:
            assert torch.equal(a[key], b[key]), key
            continue
        ours, theirs = a[key].clone(), b[key].clone()
        if key.endswith(
            "qkv.bias"
        ):  # softmax ignores a key's bias: Adam blows up its rounding noise
            width = len(ours) // 3
            ours[width : 2 * width] = theirs[width : 2 * width] = 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=key)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    run_here(attention_distill, *DIGITS, "--out", out)
    return out


def wait_for_step(run, out, beyond):
    """Blocks until a checkpoint beyond a step, in the middle of an epoch, is there."""
    while run.poll() is None:
        if (out / "last.pt").exists():
            step = weights(out)["step"]
            if step > beyond and step % 6:
                return
    raise AssertionError("the run ended before its time: " + run.communicate()[1])


def test_killed_and_resumed_gives_the_same_bits(uninterrupted, tmp_path):
    argv = [*DIGITS, "--out", tmp_path, "--resume"]
    # In the middle of an epoch: it saves at each step.
    for kill, beyond in ((signal.SIGKILL, 3), (signal.SIGTERM, 14)):
        run = start("attention_distill.py", *argv, "--save-every", 0)
        wait_for_step(run, tmp_path, beyond)
        run.send_signal(kill)
        text, _ = run.communicate(timeout=60)
        assert run.returncode == (-kill if kill == signal.SIGKILL else 128 + kill)
        assert kill == signal.SIGKILL or "--resume goes on" in text
    assert 14 < weights(tmp_path)["step"] < 36
    result = run_here(attention_distill, *argv)
    ours, theirs = weights(tmp_path), weights(uninterrupted)
    for part in ("net", "average"):
        assert_same(ours[part], theirs[part])
    models = [weights(out, "model.pt")["model"] for out in (tmp_path, uninterrupted)]
    assert_same(*models)
    logs = log_of(tmp_path), log_of(uninterrupted)
    for a, b in zip(*logs, strict=True):
        for row in (a, b):
            row.pop("seconds"), row.pop("images_per_s")
        assert a == pytest.approx(b)
    assert result["test_top1"] == logs[1][-1]["test_top1"]


def test_a_signal_to_the_workers_too_does_not_keep_a_run_from_saving(small, tmp_path):
    """As torchrun sends it: to all processes of a run."""
    streamed = ["--memory", "0", "--workers", "2", "--epochs", "10000", "--eval-every", "10000"]
    argv = [*small, *streamed, "--teacher", "none", "--out", tmp_path]
    run = start("finetune.py", *argv, start_new_session=True)
    while run.poll() is None and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.1)
    time.sleep(1)  # somewhere among its steps
    os.killpg(run.pid, signal.SIGTERM)
    text, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and not errors, errors
    assert "--resume goes on" in text


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes as Linux lists them")
def test_a_run_whose_worker_is_killed_says_so_and_ends(small, tmp_path):
    """And the other worker with it, though to others' SIGTERM it does not listen."""
    streamed = ["--memory", "0", "--workers", "2", "--epochs", "10000", "--eval-every", "10000"]
    run = start("finetune.py", *small, *streamed, "--teacher", "none", "--out", tmp_path)
    while run.poll() is None and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.1)
    workers = []
    while run.poll() is None and len(workers) < 2:
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and "error: a process that decodes images was killed" in errors
    assert "DataLoader" not in errors  # (the other may say that it was cut off)


def test_what_a_run_learned_is_drawn_by_its_own_decoder(tmp_path):
    argv = ["--epochs", "1", "--warmup", "0", "--out", tmp_path / "mae"]
    run_here(pretrain, *argv)
    run_here(pretrain, *argv, "--reconstruct", tmp_path / "seen.png")
    assert (tmp_path / "seen.png").exists()
    for more in (["--decoder-heads", "1"], ["--components", "activation=quick_gelu"]):
        with pytest.raises(ValueError, match=f"{more[0][2:].replace('-', '_')} was"):
            run_here(pretrain, *argv, *more, "--reconstruct", tmp_path / "other.png")


def test_a_teacher_is_dismissed_in_time(uninterrupted, tmp_path):
    """Until then all is as without --until; after it there is no attention loss; resumed too."""
    run_here(attention_distill, *DIGITS, "--until", "3", "--out", tmp_path / "whole")
    always, dismissed = log_of(uninterrupted), log_of(tmp_path / "whole")
    for row, usual in zip(dismissed[:3], always[:3], strict=True):
        assert (row["class"], row["attention"]) == (usual["class"], usual["attention"])
    assert all("attention" not in row for row in dismissed[3:])
    assert dismissed[4]["class"] != always[4]["class"]
    with pytest.raises(ValueError, match="ends before"):
        attention_distill.task(attention_distill.parse(["--until", "5", "--epochs", "5"]))
    cut = (*DIGITS, "--until", "3", "--out", tmp_path / "cut")
    stop = train.save_state
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_state", lambda *of: (stop(*of), stopped(of[1].done == 24)))
        with pytest.raises(KeyboardInterrupt):
            run_here(attention_distill, *cut)
    run_here(attention_distill, *cut, "--resume")
    assert_same(weights(tmp_path / "cut")["net"], weights(tmp_path / "whole")["net"])


def stopped(now: bool) -> None:
    if now:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Of each --micro-batch: where a run of two processes is, and what it printed."""
    found = {}
    for micro_batch in (0, 10):
        out = tmp_path_factory.mktemp("two")
        argv = [*SAME, "--out", out, "--micro-batch", micro_batch]
        run = start("attention_distill.py", *argv, launcher=TORCHRUN)
        text, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
        found[micro_batch] = (out, text)
    return found


def test_two_ranks_train_to_the_weights_of_one(two_ranks, tmp_path):
    alone = run_here(attention_distill, *SAME, "--out", tmp_path)
    row = log_of(tmp_path)[-1]
    for out, text in two_ranks.values():
        for part in ("net", "average"):
            assert_same(weights(out)[part], weights(tmp_path)[part], exact=False)
        other = log_of(out)[-1]
        for key in ("class", "attention", "kl", "gradient_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-3)
        assert row["test_top1"] == pytest.approx(other["test_top1"], abs=0.11)  # of 2,000 images
        assert text.count("test top-1") == 1
    assert alone["test_top1"] == row["test_top1"]


def test_a_lost_rank_is_restarted_and_the_run_goes_on(two_ranks, tmp_path):
    argv = [*SAME, "--micro-batch", "10", "--resume", "--out", tmp_path, "--save-every", 0]
    run = start("attention_distill.py", *argv, launcher=(*TORCHRUN, "--max-restarts=2"))
    wait_for_step(run, tmp_path, 8)
    ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    text, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert "going on from step" in text
    for name, part in (("last.pt", "net"), ("last.pt", "average"), ("model.pt", "model")):
        assert_same(weights(tmp_path, name)[part], weights(two_ranks[10][0], name)[part])


def test_accuracy_counts_each_image_once():
    settings = finetune.parse(["--batch", "7"])
    dataset = data.load(settings, torch.device("cpu"))
    asked = []

    def predict(net, batch):  # right on the images whose brightest pixel is in the upper half
        asked.append(len(batch))
        return torch.nn.functional.one_hot(((batch.flatten(1).argmax(1) < 72) * 3).long(), 10)

    measured = train.accuracy(predict, torch.nn.Linear(1, 1), dataset.test, settings)
    inputs, labels = (torch.cat(x) for x in zip(*dataset.test.in_order(1), strict=True))
    guesses = [3 if x.flatten().argmax() < 72 else 0 for x in inputs]
    expected = sum(guess == y for guess, y in zip(guesses, labels.tolist(), strict=True))
    assert sum(asked) == len(labels) == 2000
    assert measured == pytest.approx(100 * expected / 2000)


def test_gradient_accumulation_changes_nothing(tmp_path):
    nets = []
    for micro_batch in ("0", "17"):
        out = tmp_path / micro_batch
        argv = [*SHORT, "--ema", "0.9", "--out", out, "--micro-batch", micro_batch]
        run_here(attention_distill, *argv)
        nets.append(weights(out)["net"])
    assert_same(*nets, exact=False)


def test_mixed_precision_and_compile_train_close_to_float32(tmp_path):
    short, rows = "--teacher none --epochs 4 --warmup 1 --eval-every 4".split(), {}
    for name, more in {"float32": "", "bf16": "--amp bf16", "compiled": "--compile on"}.items():
        row = run_here(finetune, *short, *more.split(), "--out", tmp_path / name)
        rows[name] = row["class"]
    assert rows["compiled"] == pytest.approx(rows["float32"], rel=1e-3)
    assert rows["bf16"] == pytest.approx(rows["float32"], rel=0.03)
    assert rows["bf16"] != rows["float32"]


def trace(step, mode):
    """Instead of compiling: the backend that only traces is as strict, and fast."""
    torch.nn.Module.compile(step, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("script", [attention_copy, attention_distill])
def test_a_step_compiles_as_one_graph(script, monkeypatch, tmp_path):
    """Without a break, so that CUDA graphs can hold the whole of it."""
    monkeypatch.setattr(learner.Step, "compile", trace)
    nets, short = [], "--teacher random --epochs 2 --warmup 1 --batch 50 --drop-path 0.2".split()
    for mode in ("off", "on"):
        torch.compiler.reset()
        run_here(script, *short, "--compile", mode, "--out", tmp_path / mode)
        nets.append(weights(tmp_path / mode)["net"])
    assert_same(*nets, exact=False)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path, failing, monkeypatch
):
    calls, honest = [], finetune.loss

    def explodes(*step, **bound):
        calls.append(1)
        terms, diagnostics = honest(*step, **bound)
        factor = float("nan") if len(calls) > 4 else 1
        return {name: factor * term for name, term in terms.items()}, diagnostics

    monkeypatch.setattr(finetune, "loss", explodes)
    argv = "--teacher none --num-labels 300 --epochs 3 --warmup 0 --batch 100".split()
    code, line = failing(
        finetune, [*argv, "--out", tmp_path]
    )  # 3 steps an epoch: the second explodes
    assert code == 1 and "no longer finite" in line and "--lr" in line
    state = weights(tmp_path)
    assert state["step"] == 3 and all(torch.isfinite(v).all() for v in state["net"].values())
    assert not (tmp_path / "model.pt").exists()


def test_a_full_disk_fails_the_run_and_keeps_the_last_checkpoint(tmp_path, failing, monkeypatch):
    before = []

    def report(row, *_):
        if row["epoch"] == 2:
            before.append((tmp_path / "last.pt").read_bytes())
            (tmp_path / "last.pt.part").symlink_to("/dev/full")  # where every write fails

    monkeypatch.setattr(train, "report", report)
    argv = "--teacher none --num-labels 300 --epochs 2 --warmup 0".split()
    code, line = failing(finetune, [*argv, "--out", tmp_path])
    assert code == 1 and "could not write" in line and "No space left" in line and "intact" in line
    assert (tmp_path / "last.pt").read_bytes() == before[0] and weights(tmp_path)["step"] == 6


def test_a_run_is_not_spoiled_by_another(tmp_path, failing, uninterrupted):
    kept = (uninterrupted / "last.pt").read_bytes()
    for more, words in (([], "already holds a run"), (["--resume", "--lr", "0.5"], ", now 0.5")):
        code, line = failing(attention_distill, [*DIGITS, *more, "--out", uninterrupted])
        assert code == 2 and words in line
    assert (uninterrupted / "last.pt").read_bytes() == kept
    argv, state = [*DIGITS, "--resume", "--out", tmp_path], weights(uninterrupted)
    odd = {"net": {}, "step": 1000, "rows": [], "optimizer": {}, "seconds": "long"}
    for name, value in odd.items():
        for changed in (state | {name: value}, {k: v for k, v in state.items() if k != name}):
            torch.save(changed, tmp_path / "last.pt")
            code, line = failing(attention_distill, argv)
            assert code == 2 and "does not fit this run" in line and "--overwrite" in line
    (tmp_path / "last.pt").write_bytes(kept[: len(kept) // 2])
    code, line = failing(attention_distill, argv)
    assert code == 2 and "damaged" in line


# What a run is, and what it leaves ----------------------------------------------------------------


QUICK = "--teacher none --epochs 2 --warmup 1".split()


def test_a_setting_that_is_newer_than_a_run_was_not_asked_for_then():
    before = {"lr": 0.1, "until": 5}
    assert not runs.differences(before, before | {"components": "", "new": 0})
    assert runs.differences(before, before | {"components": "registers=4"}) == [
        "components was None, now registers=4"
    ]
    assert runs.differences(before, {"lr": 0.1, "until": 0}) == ["until was 5, now 0"]


def test_another_run_is_not_gone_on_with(tmp_path, failing, uninterrupted, teacher, small):
    """Of another method, classes, number of images or teacher: each is named."""
    last, state = tmp_path / "last.pt", weights(uninterrupted)
    last.write_bytes((uninterrupted / "last.pt").read_bytes())
    code, line = failing(attention_copy, [*DIGITS, "--resume", "--out", tmp_path])
    assert code == 2 and "method was distill, now copy" in line
    for changes in ({"classes": list("abcdefghij")}, {"images": 99}, {"teacher_weights": "0123"}):
        torch.save(state | {"run": state["run"] | changes}, last)
        code, line = failing(attention_distill, [*DIGITS, "--resume", "--out", tmp_path])
        assert code == 2 and f"{next(iter(changes))} was " in line and "--overwrite" in line
    argv = [*small, "--out", tmp_path / "mine", "--teacher", tmp_path / "teacher.pt"]
    (tmp_path / "teacher.pt").write_bytes(Path(teacher).read_bytes())
    run_here(attention_copy, *argv, "--epochs", "1", "--warmup", "0")
    found = torch.load(teacher, weights_only=True)
    found["model"]["cls_token"] += 1
    torch.save(found, tmp_path / "teacher.pt")
    again = [*argv, "--epochs", "1", "--warmup", "0", "--resume"]
    code, line = failing(attention_copy, again)
    assert code == 2 and "teacher_weights was " in line
    found["model"]["cls_token"] -= 1
    torch.save(found | {"normalization": ([0.1] * 3, [0.2] * 3)}, tmp_path / "teacher.pt")
    code, line = failing(attention_copy, again)
    assert code == 2 and "normalization was None, now ([0.1" in line


def test_renamed_classes_are_another_run(photos, small, tmp_path, failing):
    images = shutil.copytree(photos, tmp_path / "images")
    argv = [*small, "--data-dir", images, "--teacher", "none", "--out", tmp_path / "run"]
    run_here(finetune, *argv)
    for part in ("train", "val"):
        (images / part / "blue").rename(images / part / "azure")
    code, line = failing(finetune, [*argv, "--resume"])
    assert code == 2 and "classes was " in line


def test_starting_over_leaves_nothing_of_the_run_before(tmp_path, monkeypatch):
    run_here(finetune, *QUICK, "--out", tmp_path)
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert left == {"config.json", "curves.png", "last.pt", "log.jsonl", "model.pt", "test.pt"}

    def killed(*step, **bound):
        raise KeyboardInterrupt

    again = [*QUICK, "--lr", "0.5", "--overwrite", "--out", tmp_path]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(learner.Learner, "find_micro_batch", killed)  # what can still be refused
        run_here(finetune, *again)
    assert left == {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    monkeypatch.setattr(learner.Learner, "learn", killed)
    with pytest.raises(KeyboardInterrupt):  # before its first checkpoint
        run_here(finetune, *again)
    assert not {"last.pt", "model.pt"} & {path.name for path in tmp_path.iterdir()}


def test_what_is_not_a_runs_is_not_written_over(tmp_path, failing, teacher):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    code, line = failing(finetune, [*QUICK, "--out", tmp_path])
    assert code == 2 and "but are of none" in line
    assert (tmp_path / "config.json").read_text() == '{"model_type": "vit"}'
    mine = shutil.copy(teacher, tmp_path / "model.pt")
    for named in (mine, f"vit_base_patch16_224.mae={mine}"):
        argv = ["--teacher", named, "--overwrite", "--out", tmp_path]
        code, line = failing(attention_copy, argv)
        assert code == 2 and "lies in --out" in line and mine.exists()


def test_a_model_without_its_state_is_not_written_over(tmp_path, failing):
    run_here(finetune, *QUICK, "--out", tmp_path)
    (tmp_path / "last.pt").unlink()
    for more in ([], ["--resume"]):
        code, line = failing(finetune, [*QUICK, *more, "--out", tmp_path])
        assert code == 2 and "no last.pt to go on from" in line
    assert (tmp_path / "model.pt").exists()


def test_a_moved_teacher_is_the_same_and_another_batch_is_not(tmp_path, teacher, small, failing):
    shutil.copy(teacher, tmp_path / "moved.pt")
    argv = [*small, "--layers", "2", "--batch", "0", "--out", tmp_path / "run"]
    run_here(attention_copy, *argv, "--teacher", teacher)
    run_here(attention_copy, *argv, "--teacher", tmp_path / "moved.pt", "--resume")
    state = weights(tmp_path / "run")
    assert state["run"]["images_per_step"] == 3  # --batch 0: an eighth of 24
    torch.save(state | {"run": state["run"] | {"images_per_step": 2}}, tmp_path / "run" / "last.pt")
    code, line = failing(attention_copy, [*argv, "--teacher", teacher, "--resume"])
    assert code == 2 and "images_per_step was 2, now 3" in line


def test_processes_that_go_on_from_different_steps_are_told(monkeypatch):
    """As they would with --out on disks of their own."""
    steps = iter([[4, 4], [4, 0]])
    monkeypatch.setattr(train, "from_all", lambda mine: next(steps))
    train.check_agreement(Settings(done=4))
    with pytest.raises(Failed, match="different steps"):
        train.check_agreement(Settings(done=4))


def test_two_runs_do_not_share_a_folder(tmp_path, failing):
    """The second ends with one line; the first, when it is killed, leaves no lock behind."""
    argv = [*DIGITS, "--out", tmp_path, "--save-every", 0]
    run = start("attention_distill.py", *argv)
    wait_for_step(run, tmp_path, 1)
    for more in (["--overwrite"], ["--resume"]):
        code, line = failing(attention_distill, [*argv, *more])
        assert code == 2 and "another process is training in" in line
    assert run.poll() is None
    run.kill()
    run.wait()
    run_here(attention_distill, *argv, "--resume")


def test_another_number_of_threads_is_said_at_a_resume(tmp_path, capsys):
    argv = [*QUICK, "--out", tmp_path]
    run_here(finetune, *argv)
    state = weights(tmp_path)
    assert state["threads"] == torch.get_num_threads()
    run_here(finetune, *argv, "--resume")
    assert "threads, now" not in capsys.readouterr().out
    torch.save(state | {"threads": 64}, tmp_path / "last.pt")
    run_here(finetune, *argv, "--resume")
    assert "begun with 64 threads, now" in capsys.readouterr().out


SIMULATED = """
import sys, torch
sys.path.insert(0, {root!r})
import launch, {script}
honest, sizes = {script}.loss, []
def loss(net, images, *rest, **bound):
    sizes.append(len(images))
    limit = 20 if launch.rank() == 0 else 7
    if len(images) > limit:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return honest(net, images, *rest, **bound)
{script}.loss = loss
launch.run({script}.main, {script}.parse)
print("sizes", sorted(set(sizes)))
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_micro_batch_is_found_by_itself(ranks, tmp_path):
    """By halves of 50 (or of 25 on each of two ranks, of which one has less memory)."""
    same = [*SHORT, "--epochs", "2"]
    run_here(attention_distill, *same, "--out", tmp_path / "whole")
    driver = tmp_path / "driver.py"
    driver.write_text(SIMULATED.format(root=str(ROOT), script="attention_distill"))
    launcher = (sys.executable,) if ranks == 1 else TORCHRUN
    run = start(driver, *same, "--out", tmp_path / "pieces", launcher=launcher)
    text, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    found = 13 if ranks == 1 else 7
    assert f"{found} images at a time" in " ".join(text.split())
    assert_same(weights(tmp_path / "whole")["net"], weights(tmp_path / "pieces")["net"], False)


def test_a_run_says_what_it_is_and_where_everything_went(tmp_path, teacher, small, capsys):
    argv = [*small, "--teacher", teacher, "--ema", "0.9", "--out", tmp_path]
    run_here(attention_distill, *argv, "--layers", "2")
    lines = capsys.readouterr().out.splitlines()
    said, fingerprint = " ".join(" ".join(lines).split()), checkpoints.read(teacher).fingerprint
    for words in (
        f"distill -> {tmp_path}", "micro: 64 wide, 4 deep, 4 heads", "patches of 4 x 4",
        "pretrain, 2 epochs", fingerprint, "24 to train on, 15 to validate and test on; 3 classes",
        "--layers 2",
        "warm-up 1 epochs", "float32",
        "2 epochs of 3 batches of 8", "test top-1",
        "model.pt, test.pt, log.jsonl, curves.png, last.pt",
    ):  # fmt: skip
        assert words in said, words
    net = checkpoints.open_model(tmp_path / "model.pt").net
    assert f"{sum(p.numel() for p in net.parameters()):,} parameters" in said
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["run"]["teacher_weights"] == fingerprint
    assert config["run"]["images"] == 30 and config["run"]["classes"] == ["blue", "green", "red"]
    made = checkpoints.read(tmp_path / "model.pt")
    assert made.method == "distill" and made.settings["layers"] == "2"


def test_the_best_epoch_of_validation_is_named(capsys):
    rows = [{"epoch": i + 1, "val_top1": v} for i, v in enumerate((50.0, 70.0, 60.0))]
    progress.conclude([*rows[:1], {"epoch": 9}, *rows[1:]], Path("out"))
    assert "70.0 % after epoch 2 (what is reported is the last, 60.0 %)" in capsys.readouterr().out
    progress.conclude(rows[:2], Path("out"))
    assert "best" not in capsys.readouterr().out


def test_curves_show_each_term_and_the_validation():
    rows = [{"epoch": i, "class": 1 / i, "divergence": 2 / i, "lr": 1} for i in (1, 2, 3)]
    rows[2] |= {"val_top1": 50, "val_top1_ema": 55}
    lines = [line for axis in pictures.curves(rows).axes for line in axis.lines]
    assert {line.get_label(): list(line.get_ydata()) for line in lines} == {
        "class": [1, 1 / 2, 1 / 3],
        "divergence": [2, 1, 2 / 3],
        "val top1": [50],
        "val top1 ema": [55],
    }
