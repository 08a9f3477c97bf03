"""The benchmark: what it calls plain and ours compute the same, and it counts operations as PyTorch's own counter does."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attention_distill
import benchmark
import vit

TINY = ["--data", "cifar10", "--model", "micro", "--patch", "8", "--device", "cpu", "--amp", "off"]
METHODS = list(benchmark.SCRIPTS)


def recipe(method, *argv):
    return benchmark.settings(method, benchmark.options([*TINY, *argv]), 4)


def attend_plainly(q, k, v):
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v


@pytest.mark.parametrize("method", METHODS)
def test_plain_and_ours_have_the_same_losses_and_gradients(method):
    found = {}
    for variant in ("plain", "ours"):
        learner, images, labels = benchmark.build(method, variant, recipe(method))
        torch.manual_seed(1)  # drop path, masks
        terms = learner.step(torch.linspace(-2, 2, images.numel()).view_as(images).sin(), labels.roll(1))
        sum(terms.values()).backward()
        found[variant] = terms | {k: p.grad for k, p in learner.net.named_parameters() if p.grad is not None}
    if method == "copy":  # a copied layer makes no queries and keys of its own, so their weights have no gradient
        for name, grad in found["plain"].items():
            rows = 2 * len(grad) // 3 if "qkv" in name else 0
            assert not found["ours"][name].flatten()[:rows].any()
    assert found["plain"].keys() == found["ours"].keys() and len(found["ours"]) > 40
    for name, theirs in found["plain"].items():
        torch.testing.assert_close(found["ours"][name], theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item(), msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_operations_are_counted_as_pytorch_counts_them(method, monkeypatch):
    monkeypatch.setattr(vit, "attend", attend_plainly)  # fused attention has formulas of its own
    monkeypatch.setattr(attention_distill, "attention_loss_at_once", attention_distill.attention_loss)
    args = recipe(method, "--layers", "0,2")
    learner, images, labels = benchmark.build(method, "ours", args)
    with FlopCounterMode(display=False) as counter:
        sum(learner.step(images, labels).values()).backward()
    beyond = 0
    if method == "distill":  # the definition makes both maps of a layer once more, and takes the gradient of the student's
        patches, dim, maps = (32 // 8) ** 2, vit.SIZES["micro"][0], 4 * 2 - 1
        beyond = maps * 2 * (1 + patches) ** 2 * dim
    assert counter.get_total_flops() == pytest.approx(len(images) * (benchmark.operations(method, args) + beyond), rel=1e-9)


def test_a_run_leaves_a_record_that_its_command_replaces(tmp_path, capsys):
    argv = [*TINY, "--method", "distill", "--variant", "plain,ours", "--batch", "4", "--steps", "4", "--results", str(tmp_path)]
    command, path = "python benchmark.py " + " ".join(argv), tmp_path / "benchmark-cpu.json"
    path.write_text(json.dumps([{"command": command, "rows": "old"}, {"command": "another"}]))
    benchmark.main(benchmark.options(argv))
    another, record = json.loads(path.read_text())
    assert another == {"command": "another"} and record["command"] == command
    rows = record["rows"]["distill"]
    assert rows["ours"]["times_plain"] == pytest.approx(rows["ours"]["images_per_s"] / rows["plain"]["images_per_s"], rel=1e-2)
    for row in rows.values():
        assert row["memory_gib"] >= 0 and row["batch"] == 4
        rate = row["images_per_s"] * row["gflop_per_image"] / 1000 / record["matrix_tflops"]
        assert 0 < row["share"] == pytest.approx(rate, rel=0.05)
    assert "x plain" in capsys.readouterr().out


def test_a_strange_record_and_too_few_photos_are_refused_before_anything_is_measured(failing, tmp_path, photos):
    code, line = failing(benchmark, ["--loader", "--data-dir", photos, "--results", tmp_path, "--device", "cpu"])
    assert code == 2 and "--batch 64 is more than the 30 training images" in line
    (tmp_path / "benchmark-cpu.json").write_text('{"a": 1}')
    code, line = failing(benchmark, [*TINY, "--results", tmp_path])
    assert code == 2 and "holds no records of benchmark.py" in line


def test_the_figures_of_the_readme_are_those_of_the_record_and_of_the_count():
    root = Path(benchmark.__file__).parent
    readme, records = (root / "README.md").read_text(), json.loads((root / "results" / "benchmark-cpu.json").read_text())
    small, full = records[0], benchmark.options(["--model", "large"])
    assert small["command"] == "python benchmark.py --method all --model small --batch 8"
    for method, rows in small["rows"].items():
        speeds = " | ".join(f"{rows[variant]['images_per_s']:.1f}" for variant in ("plain", "plain-amp", "ours"))
        memory = f"{rows['plain']['memory_gib']:.1f} → {rows['ours']['memory_gib']:.1f}"
        assert f"| {method} | {speeds} | {rows['ours']['times_plain']:.1f} | {memory} |" in readme
        recipe = benchmark.settings(method, full, 64)
        flop = benchmark.operations(method, recipe)
        hours = flop * recipe.epochs * benchmark.IMAGES / 400e12 / 3600
        assert f"| {method} | {recipe.epochs} | {flop / 1e9:.0f} | {hours:.0f} | {hours / 8:.1f} |" in readme
    slow = {method: f"{rows['ours']['times_plain']:.1f} times" for method, rows in records[1]["rows"].items()}
    assert records[1]["command"].endswith("--amp off")
    assert f"ours is {slow['copy']} plain for copy and {slow['distill']} for distillation" in readme


@pytest.mark.parametrize("argv, words", [
    (["--method", "ensemble"], "choose finetune, copy, distill, pretrain or all"),
    (["--variant", "fast"], "choose plain, plain-amp, ours or all"),
    (["--batch", "many"], "write a number, or several with commas"),
    (["--steps", "0"], "--steps 0"),
    (["--data", "digits"], "choose cifar10 or imagenet"),
    (["--model", "giant"], "no ViT is called 'giant'"),
    (["--patch", "5"], "no multiple of the patch size"),
])  # fmt: skip
def test_bad_input_is_one_line(argv, words, failing, tmp_path):
    code, line = failing(benchmark, [*TINY, "--results", tmp_path, *argv])
    assert code == 2 and words in line
