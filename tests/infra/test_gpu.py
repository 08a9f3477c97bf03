"""On a GPU: the same as on a CPU; mixed precision, compilation, CUDA graphs, a full memory."""

import os
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
from common import augment
from common.attention import compare_maps
from related import linear_attention, reminders
from study import variants
from vit import QK, attend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
ROOT = Path(train.__file__).parent
DEVICE = "cuda"
BRIEF = "--epochs 2 --warmup 0.5 --batch 50 --amp off".split()
SHORT = [*BRIEF, "--num-labels", "300", "--eval-every", "2"]
PHOTOS = "--teacher none --amp off --compile off --drop-path 0 --random-erase 0".split()
LIMITED = """
import finetune, torch, common.launch as launch
whole = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(0.9 * 2**30 / whole)
launch.run(finetune.main, finetune.parse)
"""


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):  # two kernels must not differ by TF32's rounding
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)
    torch.compiler.reset()  # no graphs of other tests


def run_here(script, *argv):
    return script.main(script.parse(list(map(str, argv))))


def assert_close(*outs):
    one, two = (torch.load(Path(out) / "last.pt", map_location="cpu") for out in outs)
    for name, value in one["net"].items():
        if name.endswith(("qkv.bias", "in_proj_bias")):  # keys' have no gradient but rounding's
            value.chunk(3)[1].copy_(two["net"][name].chunk(3)[1])
    torch.testing.assert_close(one["net"], two["net"], rtol=1e-3, atol=1e-4)
    row, expected = one["rows"][-1], two["rows"][-1]
    for name in row.keys() - {"seconds", "images_per_s"}:
        assert row[name] == pytest.approx(expected[name], rel=1e-2), name


@pytest.mark.parametrize("script, argv", [
    (finetune, "--layer-decay 0.75"), (variants, "--maps impulse --how distill"),
    (finetune, "--teacher none --ema 0.9 --mixup 0.8 --micro-batch 20 --drop-path 0"),
    (finetune, "streamed photographs"), (linear_attention, "--lora --teacher taught/model.pt"),
    (attention_copy, ""),
    (attention_distill, ""), (variants, "--maps mean"), (reminders, "--scenes 200"),
])  # fmt: skip
def test_a_run_is_what_it_is_on_a_cpu(script, argv, small, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.images.CACHE", 0)
    if script is linear_attention:
        run_here(finetune, *SHORT, "--data", "digits", "--device", "cpu", "--out", "taught")
    argv = [*(BRIEF if script is reminders else SHORT), *argv.split()]  # scenes have no labels
    if "photographs" in argv:
        argv = [*small, *PHOTOS, "--workers", "2"]
    for device in ("cpu", DEVICE):
        run_here(script, *argv, "--device", device, "--out", tmp_path / device)
    assert_close(tmp_path / DEVICE, tmp_path / "cpu")


@pytest.mark.parametrize("dtype, close", [(torch.float32, 3e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("tokens, width", [(17, 16), (197, 64), (261, 64)])
def test_attention_and_its_loss_are_those_in_double_precision(tokens, width, dtype, close):
    torch.manual_seed(0)
    drawn = torch.randn(5, 2, 3, tokens, width, device=DEVICE).to(dtype)
    bias = torch.randn(1, 3, tokens, tokens, device=DEVICE).to(dtype)
    p = torch.randn(2, 3, tokens, tokens, device=DEVICE).softmax(-1).to(dtype)
    forms = {
        "fused": lambda q, k, v, *_: attend(QK(q, k), v),
        "with a bias": lambda q, k, v, *_: attend(QK(q, k, bias.to(q.dtype)), v),
        "lent": lambda q, k, v, *_: attend(QK(q.detach(), k.detach()), v),
        "a lent map": lambda q, k, v, *_: attend(QK.from_map(p.to(q.dtype)), v),
        "loss": lambda q, k, v, *theirs: compare_maps(QK(q, k), QK(*theirs))[0],
    }
    for name, form in forms.items():
        found = []
        for x in (drawn, drawn.double()):
            parts = [part.clone().requires_grad_() for part in x.unbind()]
            with torch.autocast(DEVICE, torch.bfloat16, enabled=x.dtype is torch.bfloat16):
                y = form(*parts)
            grads = torch.autograd.grad(y.float().square().sum(), parts[:3], allow_unused=True)
            found.append([y, *(g for g in grads if g is not None)])
        for ours, expected in zip(*found, strict=True):
            assert (ours - expected).norm() <= close * expected.norm(), name
    torch.testing.assert_close(y, attention_distill.attention_loss(QK(*parts[:2]), QK(*parts[3:])))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("script", [attention_copy, attention_distill])
def test_mixed_precision_trains_close_to_float32(script, amp):
    slow = [*SHORT, "--blr", "1e-2"]  # at a high rate fp16 skips a step until its scale fits
    exact, mixed = (run_here(script, *slow, "--amp", x, "--out", x)["loss"] for x in ("off", amp))
    assert mixed == pytest.approx(exact, rel=0.1) and mixed != exact
    assert bool(torch.load(f"{amp}/last.pt")["scaler"]) == (amp == "fp16")


@pytest.mark.parametrize("how", ["on", "graphs"])
@pytest.mark.parametrize("script", [finetune, attention_copy, attention_distill])
def test_a_compiled_step_is_the_step(script, how, tmp_path):
    for compiled in ("off", how):
        run_here(script, *SHORT, "--compile", compiled, "--out", tmp_path / compiled)
    assert_close(tmp_path / how, tmp_path / "off")


def test_a_recorded_step_draws_anew_as_its_seed_says():
    """CUDA graphs do not replay which paths were dropped."""
    argv = [*SHORT, "--teacher", "random", "--drop-path", "0.5", "--compile", "graphs"]
    settings = attention_distill.parse(argv)
    task, losses = attention_distill.task(settings, data.load(settings)), []
    task.net.train()
    learner = train.Learner(task, settings)
    learner.wrap_loss("graphs")
    batch = next(task.data.train.epoch(0))
    for seed in (0, 1, 2, 3, 4, 3, 4):
        augment.reseed(learner.device, seed)
        loss = learner.compute_loss(*batch)
        losses.append(loss.item())
        loss.backward()
        learner.optimizer.zero_grad()
    assert len(set(losses[2:5])) == 3  # the first two warm up, and are recorded
    assert losses[3:5] == pytest.approx(losses[5:])


def test_stopped_and_resumed(interrupt):
    argv = [*SHORT, "--drop-path", "0.2", "--ema", "0.9", "--out"]
    run_here(attention_distill, *argv, "whole")
    interrupt(attention_distill, attention_distill.parse([*argv, "cut"]))
    assert_close("cut", "whole")


def test_how_many_images_fit_in_a_small_memory_is_found_by_trying(small):
    big = "--batch 24 --image-size 224 --patch 16 --model small --out".split()
    argv, how = [*small, *PHOTOS, *big], dict(capture_output=True, text=True, timeout=120)
    env = os.environ | {"PYTHONPATH": str(ROOT), "NVIDIA_TF32_OVERRIDE": "0"}
    run = subprocess.run([sys.executable, "-c", LIMITED, *argv, "little"], env=env, **how)
    assert not run.returncode and "images at a time" in " ".join(run.stdout.split()), run.stderr
    run_here(finetune, *argv, "enough")
    assert_close("little", "enough")
