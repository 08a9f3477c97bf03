"""The benchmark: plain and ours compute the same. Operations are counted as PyTorch counts them."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attention_distill
import recipes
import vit
from speed import benchmark, loss_forms, measure
from vit import QK

ROOT = Path(vit.__file__).parent
TINY = "--data cifar10 --model micro --device cpu --amp off".split()
METHODS = list(benchmark.SCRIPTS)


def get_recipe(method):
    return replace(benchmark.get_recipe(method, benchmark.parse(TINY), 4), patch=8)


def build(method, variant):
    learner, *batch = benchmark.build(method, variant, get_recipe(method))
    torch.manual_seed(1)  # drop path, masks
    images, labels = (torch.linspace(-2, 2, x.numel()).view_as(x).sin() for x in batch)
    return learner, images, labels.softmax(-1)


@pytest.mark.parametrize("method", METHODS)
def test_plain_and_ours_have_the_same_losses_gradients_and_steps(method):
    found, steps = {}, {}
    for variant in benchmark.VARIANTS:
        learner, *batch = build(method, variant)
        loss = learner.compute_loss(*batch)
        loss.backward()
        named = learner.net.named_parameters()
        found[variant] = {"loss": loss} | {k: p.grad for k, p in named if p.grad is not None}
        learner.optimizer.zero_grad()
        learner.train_step(*batch, 1e-3)
        steps[variant] = learner.net.state_dict()
    amp, exact = (found[variant]["loss"].item() for variant in ("plain-amp", "plain"))
    assert amp == pytest.approx(exact, rel=1e-2) and amp != exact
    assert found["plain"].keys() == found["ours"].keys() and len(found["ours"]) > 40
    for name, theirs in found["plain"].items():
        close = 1e-5 * theirs.abs().max().item()
        torch.testing.assert_close(found["ours"][name], theirs, rtol=1e-5, atol=close, msg=name)
        if method == "finetune" and name != "loss" and not name.endswith("qkv.bias"):  # keys': 0
            ours, theirs = (steps[variant][name] for variant in ("ours", "plain"))
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_operations_are_counted_as_pytorch_counts_them(method, monkeypatch):
    # Fused attention has formulas of its own, and a custom gradient is not seen as such.
    monkeypatch.setattr(vit, "attend", lambda qk, v: qk.map() @ v)
    definition = lambda *maps: (attention_distill.attention_loss(*maps), torch.zeros(()))  # noqa: E731
    monkeypatch.setattr(attention_distill, "compare_maps", definition)
    recipe = get_recipe(method)
    if method in ("copy", "distill"):
        recipe = replace(recipe, layers="0,2")
    learner, images, labels = benchmark.build(method, "ours", recipe)
    with FlopCounterMode(display=False) as counter:
        learner.compute_loss(images, labels).backward()
    expected = measure.count_operations(method, recipe)
    if method == "distill":  # the definition makes both maps once more, and one gradient of a map
        patches, dim, maps = (32 // 8) ** 2, recipes.SIZES["micro"][0], 4 * 2 - 1
        expected += maps * 2 * (1 + patches) ** 2 * dim
    assert counter.get_total_flops() == pytest.approx(len(images) * expected, rel=1e-9)


def test_all_forms_of_the_loss_have_its_gradient():
    q, k, q_t, k_t = torch.randn(4, 2, 3, 20, 8, dtype=torch.float64).unbind()
    student = QK(q.requires_grad_(), k.requires_grad_())
    losses = [form(student, QK(q_t, k_t)) for form in loss_forms.FORMS.values()]
    expected, *found = (torch.autograd.grad(loss, (q, k)) for loss in losses)
    for other in found:
        torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_a_run_leaves_a_record_that_its_command_replaces(photos, monkeypatch):
    argv = "--method distill --batch 4,8 --steps 4 --record".split() + TINY
    monkeypatch.setattr(sys, "argv", ["benchmark", *argv])
    monkeypatch.setattr(benchmark, "has_fast_bf16", lambda where: False)
    monkeypatch.setattr(measure, "measure_matrix_rate", lambda device: 1e11)
    monkeypatch.setattr(loss_forms, "TOKENS", (5,))
    monkeypatch.setitem(loss_forms.FORMS, "left out", Mock(side_effect=RuntimeError))
    command, path = "python -m speed.benchmark " + " ".join(argv), Path("speed/benchmark-cpu.json")
    path.parent.mkdir()
    path.write_text(json.dumps([{"command": command, "rows": "old"}, {"command": "another"}]))
    benchmark.main(benchmark.parse(argv))
    another, record = json.loads(path.read_text())
    assert another == {"command": "another"} and record["command"] == command
    rows = record["rows"]["distill"]
    assert rows.keys() == {"plain", "ours"}  # bf16 is not emulated
    speed, flop = (rows["ours"][name] for name in ("images_per_s", "gflop_per_image"))
    assert rows["ours"]["share"] == pytest.approx(speed * flop / 100, rel=0.05)
    row = benchmark.main(benchmark.parse(f"--method loader --data-dir {photos} --batch 8".split()))
    assert row["loader_images_per_s"] > 0 and len(json.loads(path.read_text())) == 2  # as before
    loss_forms.main(loss_forms.parse(["--record", "--device", "cpu"]))
    *_, forms = json.loads(path.read_text())
    assert forms["ms_per_image_and_layer"].keys() == loss_forms.FORMS.keys() - {"left out"}


def test_the_figures_of_the_readme_are_those_of_the_record_and_of_the_count():
    files = "README.md", "benchmark-cpu.json", "benchmark-NVIDIA-H200.json"
    readme, cpu, h200 = (ROOT.joinpath("speed", name).read_text() for name in files)
    small, gpu = json.loads(cpu)[0], [x for x in json.loads(h200) if "rows" in x]
    for method, of in (pair for record in (small, *gpu) for pair in record["rows"].items()):
        plain, amp, ours = (of[variant] for variant in benchmark.VARIANTS)
        shown = " | ".join(f"{row['images_per_s']:.1f}" for row in (plain, amp, ours))
        times = f"{ours['times_plain']:.1f} | {ours['times_plain-amp']:.2f}"
        memory = f"{amp['memory_gib']:.1f} → {ours['memory_gib']:.1f}"
        assert f"| {method} | {shown} | {times} | {memory} |" in readme
    for method in benchmark.SCRIPTS:
        (of,) = (x for x in gpu if x["data"] == "imagenet" and method in x["rows"])
        recipe = benchmark.get_recipe(method, benchmark.parse(["--model", "large"]), 64)
        flop = measure.count_operations(method, recipe)
        rate = of["rows"][method]["ours"]["share"] * of["matrix_tflops"]
        hours = flop * recipe.epochs * benchmark.IMAGES / rate / 3.6e15
        assert f"| {method} | {recipe.epochs} | {flop / 1e9:.0f} | {hours:.0f} |" in readme
