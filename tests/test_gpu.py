"""On a GPU: the same as on a CPU; mixed precision, compilation, CUDA graphs, a full memory."""

import launch

import pytest
import torch
from test_runs import ROOT, TORCHRUN, assert_same, log_of, run_here, start, stopped, weights

import attention_copy
import attention_distill
import augment
import finetune
import train
from attention import Attended, attend, lend_map
from attention_loss import attention_loss, attention_loss_plain
from experiments import variants
from learner import Learner
from related import linear_attention, reminders

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
BRIEF = "--epochs 2 --warmup 1 --batch 50 --amp off".split()
SHORT = [*BRIEF, "--num-labels", "300", "--eval-every", "2"]
PHOTOS = "--teacher none --amp off --compile off --drop-path 0 --random-erase 0".split()
LIMITED = """
import sys
sys.path.insert(0, {root!r})
import launch, torch, finetune
whole = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction({gib} * 2**30 / whole)
launch.run(finetune.main, finetune.parse)
"""


def assert_close(out, other):
    assert_same(weights(out)["net"], weights(other)["net"], exact=False)
    row, expected = log_of(out)[-1], log_of(other)[-1]
    for name in row.keys() - {"seconds", "images_per_s"}:
        assert row[name] == pytest.approx(expected[name], rel=1e-2), name


# What a CPU computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("script, argv", [
    (finetune, ["--layer-decay", "0.75"]),
    (finetune, ["--teacher", "none", "--ema", "0.9", "--mixup", "0.8", "--micro-batch", "20"]),
    (attention_copy, []),
    (attention_distill, ["--until", "1"]),
    (variants, ["--maps", "mean"]),
    (variants, ["--maps", "impulse", "--how", "distill"]),
    (linear_attention, ["--lora", "--teacher", "taught/model.pt"]),
    (reminders, ["--scenes", "200"]),
])  # fmt: skip
def test_a_run_is_what_it_is_on_a_cpu(script, argv, tmp_path):
    if "taught/model.pt" in argv:
        run_here(finetune, *SHORT, "--device", "cpu", "--out", "taught")
    same = BRIEF if script is reminders else SHORT  # scenes have no labels to count
    for device in ("cpu", "cuda"):
        run_here(script, *same, *argv, "--device", device, "--out", tmp_path / device)
    assert_close(tmp_path / "cuda", tmp_path / "cpu")


def test_photographs_that_are_streamed(small, tmp_path):
    argv = [*small, *PHOTOS, "--memory", "0", "--workers", "2"]
    for device in ("cpu", "cuda"):
        run_here(finetune, *argv, "--device", device, "--out", tmp_path / device)
    assert_close(tmp_path / "cuda", tmp_path / "cpu")


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("tokens, width", [(17, 16), (197, 64), (261, 64)])
def test_attention_and_its_loss_are_those_in_double_precision(tokens, width, dtype, close):
    torch.manual_seed(0)
    drawn = torch.randn(5, 2, 3, tokens, width, device="cuda").to(dtype)
    bias = torch.randn(1, 3, tokens, tokens, device="cuda").to(dtype)
    p = torch.randn(2, 3, tokens, tokens, device="cuda").softmax(-1).to(dtype)
    forms = {
        "fused": lambda q, k, v, *_: attend(Attended(q, k, v)),
        "with a bias": lambda q, k, v, *_: attend(Attended(q, k, v, bias.to(q.dtype))),
        "lent": lambda q, k, v, *_: attend(Attended(q.detach(), k.detach(), v)),
        "a lent map": lambda q, k, v, *_: attend(lend_map(p.to(q.dtype))._replace(v=v)),
        "loss": lambda q, k, v, *theirs: attention_loss(Attended(q, k), Attended(*theirs))[0],
    }
    for name, form in forms.items():
        found = []
        for x in (drawn, drawn.double()):
            parts = [part.clone().requires_grad_() for part in x.unbind()]
            with torch.autocast("cuda", torch.bfloat16, enabled=x.dtype is torch.bfloat16):
                y = form(*parts)
            if name == "loss":
                theirs = attention_loss_plain(Attended(*parts[:2]), Attended(*parts[3:]))
                torch.testing.assert_close(y.double(), theirs.double(), rtol=close, atol=close)
            grads = torch.autograd.grad(y.float().square().sum(), parts[:3], allow_unused=True)
            found.append([y, *(g for g in grads if g is not None)])
        for ours, expected in zip(*found, strict=True):
            assert (ours - expected).norm() <= close * expected.norm(), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="there is one GPU here"
))])  # fmt: skip
def test_two_processes_train_to_the_weights_of_one(device, tmp_path):
    """On the CPU of a machine with GPUs as well."""
    argv = [*SHORT, "--device", device, "--out"]
    run = start("attention_distill.py", *argv, tmp_path / "two", launcher=TORCHRUN)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    run_here(attention_distill, *argv, tmp_path / "one")
    assert_close(tmp_path / "two", tmp_path / "one")


# What only a GPU does -----------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("script", [attention_copy, attention_distill])
def test_mixed_precision_trains_close_to_float32(script, amp, tmp_path):
    rows = [run_here(script, *SHORT, "--amp", x, "--out", tmp_path / x) for x in ("off", amp)]
    exact, mixed = (row["class"] for row in rows)
    assert mixed == pytest.approx(exact, rel=0.1) and mixed != exact
    scaler = weights(tmp_path / amp)["scaler"]
    assert bool(scaler) == (amp == "fp16")


@pytest.mark.parametrize("how", ["on", "graphs"])
@pytest.mark.parametrize("script", [finetune, attention_copy, attention_distill])
def test_a_compiled_step_is_the_step(script, how, tmp_path):
    for compiled in ("off", how):
        run_here(script, *SHORT, "--compile", compiled, "--out", tmp_path / compiled)
    assert_close(tmp_path / how, tmp_path / "off")


def test_a_recorded_step_draws_anew_as_its_seed_says():
    """Paths to drop are no part of what CUDA graphs replay."""
    argv = [*SHORT, "--teacher", "random", "--drop-path", "0.5", "--compile", "graphs"]
    settings = attention_distill.parse(argv)
    task, losses = attention_distill.task(settings), []
    learner = Learner(task.net.train(), task.loss, settings, 100)
    images, labels = next(task.data.train.epoch(0))
    for seed in (0, 1, 2, 3, 4, 3, 4):
        augment.reseed(launch.device("cuda"), seed)
        learner.backward(images, labels, share=1)
        losses.append(learner.terms.pop("class").item())
        learner.optimizer.zero_grad()
    assert len(set(losses[2:5])) == 3  # the first two warm up, and are recorded
    assert losses[3:5] == pytest.approx(losses[5:])


def test_killed_and_resumed(tmp_path, monkeypatch):
    argv = [*SHORT, "--drop-path", "0.2", "--ema", "0.9", "--out"]
    run_here(attention_distill, *argv, tmp_path / "whole")
    save = train.save_state
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_state", lambda *of: (save(*of), stopped(of[1].done == 6)))
        run_here(attention_distill, *argv, tmp_path / "cut")
    run_here(attention_distill, *argv, tmp_path / "cut", "--resume")
    assert_close(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("gib, micro_batch, words", [
    (0.9, 0, "images at a time"),
    (0.9, 24, "the memory is full: try a smaller --micro-batch"),
    (0.25, 0, "memory"),
])  # fmt: skip
def test_a_memory_that_is_too_small(gib, micro_batch, words, small, tmp_path):
    """Found out by trying, or told in one line."""
    driver = tmp_path / "driver.py"
    driver.write_text(LIMITED.format(root=str(ROOT), gib=gib))
    argv = [*small, *PHOTOS, "--batch", "24", "--image-size", "224", "--patch", "16"]
    argv += ["--model", "small", "--out"]
    more = ["--micro-batch", micro_batch]
    run = start(driver, *argv, tmp_path / "little", *more)
    text, errors = run.communicate(timeout=120)
    if micro_batch or gib < 0.5:
        lines = errors.strip().splitlines()
        assert run.returncode == 1 and len(lines) == 1 and words in lines[0], errors
        return
    assert run.returncode == 0, errors
    assert words in " ".join(text.split())
    run_here(finetune, *argv, tmp_path / "enough")
    assert_close(tmp_path / "little", tmp_path / "enough")
