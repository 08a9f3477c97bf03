"""Measures of likeness on cases whose answer is known, and the comparison of two ViTs."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import attention_copy
import data
import vit
from common import checkpoints
from experiments import analysis, measures
from teachers.load import Model, build
from teachers.vit import Config


def make(seed, config=vit.Config, **changes):
    torch.manual_seed(seed)
    shape = dict(image_size=12, patch=3, channels=1, classes=10, dim=32, depth=3, heads=4)
    return build(config(**shape | changes)).eval()


def test_divergence_is_0_of_equal_maps_and_ln_2_of_disjoint_ones_and_symmetric():
    p, q = torch.rand(2, 5, 7, dtype=torch.float64).softmax(-1).unbind()
    halves, divergence = torch.eye(2, dtype=torch.float64), measures.jensen_shannon
    assert divergence(p, p).abs().max() < 1e-12
    assert divergence(halves, halves.flip(0)).tolist() == pytest.approx([math.log(2)] * 2)
    assert torch.equal(divergence(p, q), divergence(q, p))
    m = (p + q) / 2
    expected = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    assert_close(divergence(p, q), expected)


def test_distance_is_that_between_patches_in_pixels():
    step = torch.zeros(1, 1, 10, 10)
    for i in range(10):  # each of 3x3 patches looks at the one to its right, and a bit at the class
        step[0, 0, i, 0] = 0.5
        if i:
            step[0, 0, i, i + 1 if i % 3 else i - 2] = 0.5
    assert measures.attention_distance(step, 3, 4).item() == pytest.approx((1 + 1 + 2) / 3 * 4)


def test_cka_knows_rotations_scales_and_strangers():
    torch.manual_seed(0)
    x = torch.randn(300, 20, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    for same in (x @ rotation, 5 * x + 3, torch.cat([x, torch.zeros(300, 7)], dim=1)):
        assert measures.cka(x, same) == pytest.approx(1)
    # More features than images: the usual estimate would see a likeness of 0.2 and more.
    assert abs(measures.cka(x, torch.randn(300, 600))) < 0.03
    half = torch.cat([x[:, :10], torch.randn(300, 10)], dim=1)  # half of the variance explained
    assert measures.cka(x, half) == pytest.approx(0.5, abs=0.06)
    assert measures.cka(x, half) == pytest.approx(measures.cka(half, x))
    x, y = torch.randn(3000, 5), torch.randn(3000, 4)  # many images: Kornblith's formula
    x, y = x - x.mean(0), x[:, :4] + y - (x[:, :4] + y).mean(0)
    usual = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert measures.cka(x, y) == pytest.approx(usual.item(), abs=2e-3)


@pytest.mark.parametrize("heads", [1, 3, 6])
def test_matching_is_the_best_of_all_permutations(heads):
    for seed in range(5):
        cost = np.random.default_rng(seed).normal(size=(heads, heads))
        found = measures.match(cost)
        every = itertools.permutations(range(heads))
        least = min(sum(cost[i, j] for i, j in enumerate(p)) for p in every)
        assert sorted(found) == list(range(heads))
        assert cost[range(heads), found].sum() == pytest.approx(least)


def test_a_twin_with_its_heads_shuffled_is_found_out():
    """Heads in another order: other maps head by head, the same when matched, the same features."""
    net, twin, order = make(0), make(0), [2, 0, 3, 1]
    with torch.no_grad():
        for block in twin.blocks:
            rows = torch.arange(32).view(4, 8)[order].flatten()
            for part in range(3):
                span = slice(32 * part, 32 * part + 32)
                block.attn.qkv.weight[span] = block.attn.qkv.weight[span][rows].clone()
            block.attn.proj.weight[:] = block.attn.proj.weight[:, rows]
    images = 2 * torch.randn(40, 1, 12, 12)
    batches = (images.split(size) for size in (40, 16))
    found, parts = (measures.compare(Model(net), Model(twin), images) for images in batches)
    assert found["images"] == 40 and np.allclose(found["cka"], parts["cka"], atol=1e-6)
    for i, (layer, again) in enumerate(zip(found["layers"], parts["layers"], strict=True)):
        assert layer["pairs"] == [order.index(h) for h in range(4)]
        assert layer["matched"] < 1e-6 < 1e-4 < layer["divergence"]
        assert layer["divergence"] == pytest.approx(np.mean(layer["by_head"]))
        assert found["cka"][i][i] == pytest.approx(1, abs=1e-6)
        assert np.take(layer["entropy"][0], order) == pytest.approx(layer["entropy"][1], abs=1e-5)
        assert layer["by_head"] == pytest.approx(again["by_head"], rel=1e-4)  # in any batches


@torch.no_grad()
def test_maps_of_other_tokens_are_compared_over_patches():
    images = torch.randn(5, 1, 12, 12)
    a, b = Model(make(0, Config, registers=2)), Model(make(1))
    found = measures.compare(a, b, images.split(2))
    pairs = zip(a.blockwise(images), b.blockwise(images), strict=True)
    for layer, ((x, mine), (y, theirs)) in zip(found["layers"], pairs, strict=True):
        p, q = mine.map()[:, :, 3:, 3:], theirs.map()[:, :, 1:, 1:]
        p, q = (side / side.sum(dim=-1, keepdim=True) for side in (p, q))
        by_head = measures.jensen_shannon(p, q).mean(dim=(0, 2))
        assert layer["by_head"] == pytest.approx(by_head.tolist(), rel=1e-4)
        entropies = [measures.entropy(side).mean(dim=(0, 2)).tolist() for side in (p, q)]
        assert np.allclose(layer["entropy"], entropies)
    features = x[:, 3:].mean(dim=1), y[:, 1:].mean(dim=1)
    assert found["cka"][-1][-1] == pytest.approx(measures.cka(*features), abs=1e-5)


def test_images_of_a_folder_are_of_all_its_classes(photos):
    settings = analysis.parse(["A", "B", "--images", "6", "--workers", "0", "--batch", "4"])
    argv = ["--data", "folder", "--data-dir", str(photos), "--workers", "0"]
    dataset = data.load(attention_copy.parse(argv), train=False)
    picked = torch.cat(list(analysis.pick_images(dataset, settings)))
    every, _ = (torch.cat(part) for part in zip(*dataset.test.in_order(9), strict=True))
    assert_close(picked, every[[0, 2, 4, 6, 8, 10]])  # 5 of each class, in order


@pytest.mark.slow
def test_a_copy_student_attends_with_its_teachers_maps(tmp_path):
    argv = "--data digits --teacher random --layers 0,2 --num-labels 50 --epochs 1".split()
    attention_copy.main(attention_copy.parse([*argv, "--out", str(tmp_path)]))
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save(state["teacher"], tmp_path / "teacher.pt")
    paths, out = [str(tmp_path / f"{name}.pt") for name in ("teacher", "model")], tmp_path / "out"
    argv = [*paths, "--images", "60", "--layer", "2", "--head", "0", "--out", str(out)]
    record = analysis.main(analysis.parse(argv))
    assert json.loads((out / "analysis.json").read_text()) == record and record["images"] == 60
    divergences = [layer["divergence"] for layer in record["layers"]]
    assert max(divergences[0], divergences[2]) < 1e-6 < 1e-3 < min(divergences[1], divergences[3])
    assert {path.name for path in out.glob("*.png")} == {"maps.png", "layers.png", "cka.png"}


@pytest.mark.parametrize("argv, words", [
    ("A", "two checkpoints"), ("A missing.pt", "missing.pt"), ("A B", "patch differ (3, 4)"),
    ("A random --layer 3", "--layer 3: there are 0 to 2"), ("A HEADS", "heads differ (4, 2)"),
    ("A random --head 4", "--head 4: there are 0 to 3"), ("A random --images 3", "at least 4"),
])  # fmt: skip
def test_bad_input_is_one_line(argv, words, failing, tmp_path):
    nets = {"A": make(0), "B": make(1, patch=4), "HEADS": make(4, heads=2)}
    for name, net in nets.items():
        torch.save(checkpoints.export(net), tmp_path / name)
    argv = [tmp_path / word if (tmp_path / word).exists() else word for word in argv.split()]
    failing(analysis, [*argv, "--data", "digits", "--out", tmp_path / "out"], words)
    assert not (tmp_path / "out").exists()
