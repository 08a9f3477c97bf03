"""Measures of likeness, on cases whose answer is known."""

import pytest
import torch
from torch.testing import assert_close

from study import looks
from teachers.load import Model, build
from teachers.vit import Config


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
def test_features_are_means_over_the_patches_alone():
    images, shape = torch.rand(60, 1, 12, 12), dict(dim=32, depth=3, heads=4, registers=2)
    net = build(Config(image_size=12, patch=3, channels=1, classes=10, **shape)).eval()
    expected = [x[:, 3:].mean(dim=1) for x, _ in net.blockwise(images)]
    assert_close(looks.average_patches(Model(net), images), expected)
