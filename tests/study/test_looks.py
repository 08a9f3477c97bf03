"""Measures of likeness on cases whose answer is known, and the comparison of two ViTs."""

import math

import pytest
import torch
from torch.testing import assert_close

import attention_copy
import vit
from common import checkpoints
from study import looks
from teachers.load import Model, build
from teachers.vit import Config


def make(seed, config=vit.Config, **changes):
    torch.manual_seed(seed)
    shape = dict(image_size=12, patch=3, channels=1, classes=10, dim=32, depth=3, heads=4)
    return build(config(**shape | changes)).eval()


def test_divergence_is_0_of_equal_maps_and_ln_2_of_disjoint_ones_and_symmetric():
    p, q = torch.rand(2, 5, 7, dtype=torch.float64).softmax(-1).unbind()
    halves, divergence = torch.eye(2, dtype=torch.float64), looks.jensen_shannon
    assert divergence(p, p).abs().max() < 1e-12
    assert divergence(halves, halves.flip(0)).tolist() == pytest.approx([math.log(2)] * 2)
    assert torch.equal(divergence(p, q), divergence(q, p))
    m = (p + q) / 2
    expected = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    assert_close(divergence(p, q), expected)


def test_cka_knows_rotations_scales_and_strangers():
    torch.manual_seed(0)
    x = torch.randn(300, 20, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    for same in (x @ rotation, 5 * x + 3, torch.cat([x, torch.zeros(300, 7)], dim=1)):
        assert looks.cka(x, same) == pytest.approx(1)
    # More features than images: the usual estimate would see a likeness of 0.2 and more.
    assert abs(looks.cka(x, torch.randn(300, 600))) < 0.03
    half = torch.cat([x[:, :10], torch.randn(300, 10)], dim=1)  # half of the variance explained
    assert looks.cka(x, half) == pytest.approx(0.5, abs=0.06)
    assert looks.cka(x, half) == pytest.approx(looks.cka(half, x))
    x, y = torch.randn(3000, 5), torch.randn(3000, 4)  # many images: Kornblith's formula
    x, y = x - x.mean(0), x[:, :4] + y - (x[:, :4] + y).mean(0)
    usual = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert looks.cka(x, y) == pytest.approx(usual.item(), abs=2e-3)


@torch.no_grad()
def test_maps_of_other_tokens_are_compared_over_patches():
    images = torch.randn(5, 1, 12, 12)
    a, b = Model(make(0, Config, registers=2)), Model(make(1))
    found = looks.compare(a, b, images.split(2))
    pairs = zip(a.blockwise(images), b.blockwise(images), strict=True)
    for layer, ((x, mine), (y, theirs)) in zip(found, pairs, strict=True):
        p, q = mine.map()[:, :, 3:, 3:], theirs.map()[:, :, 1:, 1:]
        p, q = (side / side.sum(dim=-1, keepdim=True) for side in (p, q))
        expected = looks.jensen_shannon(p, q).mean().item()
        assert layer["divergence"] == pytest.approx(expected, rel=1e-4)
        features = x[:, 3:].mean(dim=1), y[:, 1:].mean(dim=1)
        assert layer["cka"] == pytest.approx(looks.cka(*features), abs=1e-5)


@pytest.mark.slow
def test_a_copy_student_attends_with_its_teachers_maps(tmp_path):
    argv = "--data digits --teacher random --layers 0,2 --num-labels 50 --epochs 1".split()
    attention_copy.main(attention_copy.parse([*argv, "--out", str(tmp_path)]))
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save(state["teacher"], tmp_path / "teacher.pt")
    paths = [str(tmp_path / f"{name}.pt") for name in ("model", "teacher")]
    layers = looks.main(looks.parse([*paths, "--images", "60"]))
    divergences = [layer["divergence"] for layer in layers]
    assert max(divergences[0], divergences[2]) < 1e-6 < 1e-3 < min(divergences[1], divergences[3])


@pytest.mark.parametrize("argv, words", [
    ("A", "two checkpoints"), ("A B", "patch differ (3, 4)"), ("A HEADS", "heads differ (4, 2)"),
    ("A A --images 3", "at least 4"),
])  # fmt: skip
def test_bad_input_is_one_line(argv, words, failing, tmp_path):
    nets = {"A": make(0), "B": make(1, patch=4), "HEADS": make(4, heads=2)}
    for name, net in nets.items():
        torch.save(checkpoints.export(net), tmp_path / name)
    argv = [tmp_path / word if (tmp_path / word).exists() else word for word in argv.split()]
    failing(looks, [*argv, "--data", "digits"], words)
