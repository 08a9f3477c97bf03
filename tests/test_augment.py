"""Augmentation against plain computations, torchvision and timm."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import InterpolationMode, v2

from augment import Draws, crop_and_flip, number, rand_augment, random_erase

CPU = torch.device("cpu")


class Given:
    """Draws that hand out given numbers instead of random ones."""

    def __init__(self, numbers):
        self.numbers = torch.tensor(numbers, dtype=torch.float32)

    def uniform(self, columns):
        now, self.numbers = self.numbers.tensor_split([columns], dim=1)
        return now


def test_shifts_and_flips_are_exact():
    images = torch.randn(3, 2, 16, 16)
    centre, left = (2 + 0.5) / 5, 0.1  # of 5 shifts (-2..2), the middle one and the first
    u = [[centre, centre, 0.9], [centre, centre, 0.1], [left, centre, 0.9]]
    plain, flipped, shifted = crop_and_flip(images, Given(u), 0.0)
    torch.testing.assert_close(plain, images[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(flipped, images[1].flip(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(shifted[:, :, 2:], images[2][:, :, :-2], atol=1e-4, rtol=0)
    assert shifted[:, :, :1].abs().max() < 1e-3  # what comes in from outside is the mean: zero


def test_resized_crops_are_torchvisions():
    image = F.avg_pool2d(
        torch.randn(1, 3, 40, 40), 9, stride=1
    )  # 32x32 and smooth, so that resampling hardly matters
    w = h = 0.5  # an area of 1/4 and a square: share = 0.08 + 0.92 u
    too_wide = [1.0, 1.0]  # the whole area at 4:3, which the second try mends
    shares, ratios = [too_wide[0], *[(0.25 - 0.08) / 0.92] * 9], [too_wide[1], *[0.5] * 9]
    u = [[*shares, *ratios, 0.0, 0.999, 0.9]]  # at the left and bottom edge
    ours = crop_and_flip(image, Given(u), 0.08)
    theirs = v2.functional.resized_crop(
        image,
        16,
        0,
        int(32 * h),
        int(32 * w),
        [32, 32],
        interpolation=v2.InterpolationMode.BICUBIC,
        antialias=False,
    )
    torch.testing.assert_close(ours[..., 3:-3, 3:-3], theirs[..., 3:-3, 3:-3], atol=1e-3, rtol=0)
    whole = crop_and_flip(image, Given([[1.0] * 20 + [0.5, 0.5, 0.9]]), 0.08)  # no try fits
    torch.testing.assert_close(whole, image, atol=1e-4, rtol=0)


def test_erasing_fills_boxes_of_the_stated_size_as_often_as_asked():
    draws = Draws(torch.Generator().manual_seed(0), 4000, slice(None), CPU)
    images = torch.full((4000, 1, 32, 32), 7.0)
    erased = random_erase(images, draws, 0.25) != 7
    share = erased.flatten(1).float().mean(1)
    assert (share > 0).float().mean().item() == pytest.approx(0.25, abs=0.025)
    share = share[share > 0]
    assert share.max() < 0.37 and share.mean().item() == pytest.approx((0.02 + 0.33) / 2, abs=0.02)
    for box in erased[erased.flatten(1).any(1)][
        :50, 0
    ]:  # a box: the product of its rows and columns
        assert torch.equal(box, box.any(1)[:, None] & box.any(0)[None])


@pytest.mark.parametrize("ours, timms", [
    ("Rotate", "Rotate"), ("ShearX", "ShearX"), ("TranslateX", "TranslateXRel"),
    ("Brightness", "BrightnessIncreasing"), ("Solarize", "SolarizeIncreasing"),
])  # fmt: skip
def test_randaugment_is_as_strong_as_timms(ours, timms):
    """On a ramp of grey, each operation by itself, at magnitude 9; it may go either way."""
    ramp = torch.arange(224, dtype=torch.uint8).expand(3, 224, 224)
    both = rand_augment(9, [0, 0, 0], InterpolationMode.NEAREST)
    operation = both.transforms[0].transforms[0]
    operation._AUGMENTATION_SPACE = {ours: operation._AUGMENTATION_SPACE[ours]}
    seen = [operation(v2.functional.to_pil_image(ramp)) for _ in range(20)]
    how = {"img_mean": (0, 0, 0), "interpolation": Image.NEAREST}
    theirs = auto_augment.AugmentOp(timms, prob=1.0, magnitude=9, hparams=how)
    expected = [theirs(v2.functional.to_pil_image(ramp)) for _ in range(20)]
    for image in seen:
        assert min(difference(image, other) for other in expected) < 2
    assert difference(v2.functional.to_pil_image(ramp), seen[0]) > 20


def test_each_operation_of_randaugment_is_done_half_the_time(monkeypatch):
    calls = []
    augment = rand_augment(9, [0, 0, 0], InterpolationMode.BILINEAR)
    monkeypatch.setattr(v2.RandAugment, "forward", lambda _, x: (calls.append(0), x)[1])
    for _ in range(1000):
        augment(torch.zeros(3, 8, 8, dtype=torch.uint8))
    assert 900 < len(calls) < 1100


def difference(a, b) -> float:
    """Mean difference of two PIL images, in levels of 0..255."""
    a, b = (v2.functional.pil_to_tensor(x).float() for x in (a, b))
    return (a - b).abs().mean().item()


def test_seeds_are_a_function_of_all_their_parts():
    numbers = {
        number(*parts) for parts in ((0, 1), (1, 0), (0, 1, 0), (0, 1, "a"), (0, 1, "b"), (1, 2))
    }
    assert len(numbers) == 6 and all(0 <= n < 2**56 for n in numbers)
