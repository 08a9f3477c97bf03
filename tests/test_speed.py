"""The benchmark: plain and ours compute the same; operations are counted as PyTorch does."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attention
import attention_distill
import vit
from attention import Attended
from attention_loss import attention_loss_plain
from speed import benchmark, linear, loader, loss_forms, measure

ROOT = Path(__file__).parent.parent
TINY = ["--data", "cifar10", "--model", "micro", "--patch", "8", "--device", "cpu", "--amp", "off"]
METHODS = list(benchmark.SCRIPTS)


def recipe(method, *argv):
    return benchmark.recipe_of(method, benchmark.parse([*TINY, *argv]), 4)


@pytest.mark.parametrize("method", METHODS)
def test_plain_and_ours_have_the_same_losses_and_gradients(method):
    found = {}
    for variant in ("plain", "ours"):
        learner, images, labels = benchmark.build(method, variant, recipe(method))
        torch.manual_seed(1)  # drop path, masks
        images = torch.linspace(-2, 2, images.numel()).view_as(images).sin()
        terms, _ = learner.step(images, labels.roll(1))
        sum(terms.values()).backward()
        named = learner.net.named_parameters()
        found[variant] = terms | {k: p.grad for k, p in named if p.grad is not None}
    if method == "copy":  # a copied layer makes no queries and keys: their weights have no gradient
        for name, grad in found["plain"].items():
            rows = 2 * len(grad) // 3 if "qkv" in name else 0
            assert not found["ours"][name].flatten()[:rows].any()
    assert found["plain"].keys() == found["ours"].keys() and len(found["ours"]) > 40
    for name, theirs in found["plain"].items():
        close = 1e-5 * theirs.abs().max().item()
        torch.testing.assert_close(found["ours"][name], theirs, rtol=1e-5, atol=close, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_operations_are_counted_as_pytorch_counts_them(method, monkeypatch):
    # Fused attention has formulas of its own, and a custom gradient is not seen as such.
    monkeypatch.setattr(attention, "fused_is_slower", lambda q, v: True)
    definition = lambda *maps: (attention_loss_plain(*maps), torch.zeros(()))  # noqa: E731
    monkeypatch.setattr(attention_distill, "attention_loss", definition)
    asked = recipe(method, "--layers", "0,2")
    learner, images, labels = benchmark.build(method, "ours", asked)
    with FlopCounterMode(display=False) as counter:
        sum(learner.step(images, labels)[0].values()).backward()
    expected = measure.operations(method, asked)
    if method == "distill":  # the definition makes both maps once more, and one gradient of a map
        patches, dim, maps = (32 // 8) ** 2, vit.SIZES["micro"][0], 4 * 2 - 1
        expected += maps * 2 * (1 + patches) ** 2 * dim
    assert counter.get_total_flops() == pytest.approx(len(images) * expected, rel=1e-9)


def test_a_run_leaves_a_record_that_its_command_replaces(tmp_path, capsys, monkeypatch):
    argv = [*TINY, "--method", "distill", "--variant", "plain,ours", "--batch", "4", "--steps", "4"]
    argv += ["--record", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmark", *argv])
    command, path = "python -m speed.benchmark " + " ".join(argv), tmp_path / "benchmark-cpu.json"
    path.write_text(json.dumps([{"command": command, "rows": "old"}, {"command": "another"}]))
    benchmark.main(benchmark.parse(argv))
    another, record = json.loads(path.read_text())
    assert another == {"command": "another"} and record["command"] == command
    rows = record["rows"]["distill"]
    times = rows["ours"]["images_per_s"] / rows["plain"]["images_per_s"]
    assert rows["ours"]["times_plain"] == pytest.approx(times, rel=1e-2)
    for row in rows.values():
        assert row["memory_gib"] >= 0 and row["batch"] == 4
        rate = row["images_per_s"] * row["gflop_per_image"] / 1000 / record["matrix_tflops"]
        assert 0 < row["share"] == pytest.approx(rate, rel=0.05)
    assert "x plain" in capsys.readouterr().out


def test_nothing_is_written_unless_it_is_asked_for(tmp_path):
    for argv, files in ((["--record"], 1), ([], 0)):
        asked = loader.parse([*argv, "--results", str(tmp_path / str(files))])
        found = measure.Records(asked, torch.device("cpu")).add("speed.loader", {"cores": 2})
        assert found["cores"] == 2 and len(list(tmp_path.rglob("*.json"))) == 1


def test_linear_attention_is_timed_and_drawn_beside_softmax(tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "TOKENS", (4, 16))
    argv = ["--model", "nano", "--patch", "4", "--device", "cpu", "--record"]
    found = linear.main(linear.parse([*argv, "--results", str(tmp_path)]))
    assert found["tokens"] == (4, 16)
    assert all(min(s) > 0 and len(s) == 2 for s in found["images_per_s"].values())
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark-cpu.json", "linear-cpu.png"}


def test_all_forms_of_the_loss_have_its_gradient():
    q, k, q_t, k_t = torch.randn(4, 2, 3, 20, 8, dtype=torch.float64).unbind()
    student = Attended(q.requires_grad_(), k.requires_grad_())
    found = [
        torch.autograd.grad(form(student, Attended(q_t, k_t)), (q, k))
        for form in loss_forms.FORMS.values()
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-8)


def test_what_cannot_be_measured_or_recorded_is_refused_before_it_begins(failing, tmp_path, photos):
    argv = ["--data-dir", photos, "--results", tmp_path, "--device", "cpu"]
    code, line = failing(loader, [*argv, "--record"])
    assert code == 2 and "--batch 64 is more than the 30 training images" in line
    (tmp_path / "benchmark-cpu.json").write_text('{"a": 1}')
    code, line = failing(benchmark, [*TINY, "--record", "--results", tmp_path])
    assert code == 2 and "holds no records of speed" in line


def beside_amp(rows: dict) -> float:
    return rows["ours"]["images_per_s"] / rows["plain-amp"]["images_per_s"]


def test_the_figures_of_the_readme_are_those_of_the_record_and_of_the_count():
    readme, front = ((ROOT / page).read_text() for page in ("speed/README.md", "README.md"))
    small, slow, _, tiny, *_ = json.loads((ROOT / "results" / "benchmark-cpu.json").read_text())
    full = benchmark.parse(["--model", "large"])
    command = "python -m speed.benchmark --method all --model small --batch 8 --record"
    assert small["command"] == command
    for method, rows in small["rows"].items():
        variants = ("plain", "plain-amp", "ours")
        speeds = " | ".join(f"{rows[variant]['images_per_s']:.1f}" for variant in variants)
        memory = f"{rows['plain']['memory_gib']:.1f} → {rows['ours']['memory_gib']:.1f}"
        times = f"{rows['ours']['times_plain']:.1f}"
        assert f"| {method} | {speeds} | {times} | {beside_amp(rows):.2f} | {memory} |" in readme
        asked = benchmark.recipe_of(method, full, 64)
        flop = measure.operations(method, asked)
        hours = flop * asked.epochs * benchmark.IMAGES / 400e12 / 3600
        counted = f"{asked.epochs} | {flop / 1e9:.0f} | {hours:.0f} | {hours / 8:.1f}"
        assert f"| {method} | {counted} |" in readme
    times = {
        name: f"{rows['ours']['times_plain']:.1f} times" for name, rows in slow["rows"].items()
    }
    assert slow["command"].endswith("--amp off --record") and "cifar10" in tiny["command"]
    plain = sorted(rows["ours"]["times_plain"] for rows in small["rows"].values())
    amp = sorted(beside_amp(rows) for rows in small["rows"].values())
    assert f"{plain[0]:.1f} to {plain[-1]:.1f} times as fast" in front
    assert f"{amp[0]:.2f} to {amp[-1]:.2f} times as fast as that in bf16" in front
    found = sorted(beside_amp(rows) for rows in tiny["rows"].values())
    assert f"{found[0]:.2f} to {found[-1]:.2f} of plain-amp" in readme
    assert f"{times['copy']} plain for copy and {times['distill']} for distillation" in readme


@pytest.mark.parametrize("argv, words", [
    (["--method", "ensemble"], "choose finetune, copy, distill, pretrain or all"),
    (["--variant", "fast"], "choose plain, plain-amp, ours or all"),
    (["--batch", "many"], "write a number, or several with commas"),
    (["--steps", "0"], "--steps 0"),
    (["--data", "digits"], "choose one of cifar10, imagenet"),
    (["--model", "giant"], "choose one of nano"),
    (["--patch", "5"], "no multiple of the patch size"),
])  # fmt: skip
def test_bad_input_is_one_line(argv, words, failing, tmp_path):
    code, line = failing(benchmark, [*TINY, "--results", tmp_path, *argv])
    assert code == 2 and words in line
