"""Augmentation against plain computations, torchvision and timm."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import InterpolationMode, v2

import data
import finetune
import recipes
from common import augment

CPU = torch.device("cpu")


class Given:
    """BatchRandom that hands out given numbers instead of random ones."""

    def __init__(self, numbers):
        self.numbers = torch.tensor(numbers, dtype=torch.float32)

    def uniform(self, columns):
        now, self.numbers = self.numbers.tensor_split([columns], dim=1)
        return now


def test_shifts_and_flips_are_exact():
    images = torch.randn(3, 2, 16, 16)
    centre, left = (2 + 0.5) / 5, 0.1  # of 5 shifts (-2..2), the middle one and the first
    u = [[centre, centre, 0.9], [centre, centre, 0.1], [left, centre, 0.9]]
    plain, flipped, shifted = augment.crop_and_flip(images, Given(u), 0.0)
    torch.testing.assert_close(plain, images[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(flipped, images[1].flip(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(shifted[:, :, 2:], images[2][:, :, :-2], atol=1e-4, rtol=0)
    assert shifted[:, :, :1].abs().max() < 1e-3  # what comes in from outside is the mean: zero


def test_resized_crops_are_torchvisions():
    # 32 x 32 and smooth, so that resampling hardly matters.
    image = F.avg_pool2d(torch.randn(1, 3, 40, 40), 9, stride=1)
    # The first try, the whole area at 4:3, does not fit. The second: a square of 1/4 of the area.
    shares, ratios = [1.0, *[(0.25 - 0.08) / 0.92] * 9], [1.0, *[0.5] * 9]
    u = [[*shares, *ratios, 0.0, 0.999, 0.9]]  # at the left and bottom edge
    ours = augment.crop_and_flip(image, Given(u), 0.08)
    how = dict(interpolation=InterpolationMode.BICUBIC, antialias=False)
    theirs = v2.functional.resized_crop(image, 16, 0, 16, 16, [32, 32], **how)
    torch.testing.assert_close(ours[..., 3:-3, 3:-3], theirs[..., 3:-3, 3:-3], atol=1e-3, rtol=0)
    whole = augment.crop_and_flip(image, Given([[1.0] * 20 + [0.5, 0.5, 0.9]]), 0.08)  # no try fits
    torch.testing.assert_close(whole, image, atol=1e-4, rtol=0)


def test_erasing_fills_boxes_of_the_stated_size_as_often_as_asked():
    draws = augment.BatchRandom(augment.seeded("erase"), 4000, slice(None), CPU)
    images = torch.full((4000, 1, 32, 32), 7.0)
    erased = augment.random_erase(images, draws, 0.25, 0, 1) != 7
    share = erased.flatten(1).float().mean(1)
    assert (share > 0).float().mean().item() == pytest.approx(0.25, abs=0.025)
    share = share[share > 0]
    assert share.max() < 0.37 and share.mean().item() == pytest.approx((0.02 + 0.33) / 2, abs=0.02)
    for box in erased[erased.any((1, 2, 3))][:50, 0]:  # a box: the product of its rows and columns
        assert torch.equal(box, box.any(1)[:, None] & box.any(0)[None])


@pytest.mark.parametrize("ours, timms", [
    ("Rotate", "Rotate"), ("ShearX", "ShearX"), ("TranslateX", "TranslateXRel"),
    ("Brightness", "BrightnessIncreasing"), ("Solarize", "SolarizeIncreasing"),
])  # fmt: skip
def test_randaugment_is_as_strong_as_timms(ours, timms):
    """On a ramp of grey, each operation by itself, at magnitude 9; it may go either way."""
    ramp = torch.arange(224, dtype=torch.uint8).expand(3, 224, 224)
    both = augment.rand_augment(9, [0, 0, 0], InterpolationMode.NEAREST)
    operation = both.transforms[0].transforms[0]
    operation._AUGMENTATION_SPACE = {ours: operation._AUGMENTATION_SPACE[ours]}
    how = {"img_mean": (0, 0, 0), "interpolation": Image.NEAREST}
    theirs, image = auto_augment.AugmentOp(timms, 1.0, 9, how), v2.functional.to_pil_image(ramp)
    seen, expected = (
        [v2.functional.pil_to_tensor(change(image)).float() for _ in range(20)]
        for change in (operation, theirs)
    )
    for one in seen:  # in levels of 0..255
        assert min((one - other).abs().mean() for other in expected) < 2
    assert (seen[0] - ramp).abs().mean() > 20


@pytest.mark.parametrize("held", [True, False])
def test_the_gaps_of_randaugment_have_the_mean_of_the_data_set(held, small, monkeypatch):
    """No pixel is of the second of these colours."""
    settings = finetune.parse([*small, *"--crop-area 1 --randaugment 10 --random-erase 0".split()])
    usual, other = recipes.DATA_SETS["folder"], (0.9, 0.05, 0.6)
    for mean, gaps in ((usual.mean, False), (other, True)):
        kind = usual._replace(mean=mean)
        monkeypatch.setitem(recipes.DATA_SETS, "folder", kind)
        images = data.load(settings).train.first(24)[0]
        if held:  # on the device, as CIFAR
            pixels = torch.randint(90, 160, (40, 3, 16, 16), dtype=torch.uint8)
            draws = augment.BatchRandom(augment.seeded("gaps"), 40, slice(None), CPU)
            images = augment.Augment(settings, kind, CPU)(augment.to_pixels(pixels), draws)
        colour = images - torch.tensor(other)[:, None, None]
        assert ((colour.abs() < 0.003).all(dim=1).float().mean() > 0.01) == gaps
