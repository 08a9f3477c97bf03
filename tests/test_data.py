"""The data paths against plain computations, against torchvision, and against each other."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

import attention_copy
import checkpoints
import data
import digits
import ensemble
import finetune
import image_files
import pretrain
from augment import Draws, crop_and_flip, number, random_erase, seeded
from experiments import analysis

CPU = torch.device("cpu")


def first(part, epoch=0, start=0):
    return next(part.epoch(epoch, start))


def test_digits_are_placed_whole_and_anew_each_step_and_fixed_for_validation_and_test():
    settings = finetune.parse(["--num-labels", "0"])
    images = data.load(settings, CPU)
    assert [len(p) for p in (images.train, images.val, images.test)] == [997, 1200, 2000]
    pixels = torch.from_numpy(np.load(digits.FILE)["images"]) / 16
    for batch, labels in (first(images.train), next(images.test.in_order(50))):
        canvas = (batch * 0.35 + 0.25)[:, 0]
        assert batch.shape == (50, 1, 12, 12) and labels.shape == (50,)
        windows = canvas.unfold(1, 8, 1).unfold(
            2, 8, 1
        )  # (B, 5, 5, 8, 8): each placement that a digit can have
        for one in windows[
            :10
        ]:  # some real digit lies somewhere, and nothing on the canvas is darker than it
            inside = (one[:, :, None] >= pixels - 1e-5).all(-1).all(-1)
            assert inside.any()
    again = data.load(settings, CPU)
    assert torch.equal(first(images.train)[0], first(again.train)[0])
    assert torch.equal(images.test.source.images, again.test.source.images)
    assert not torch.equal(first(images.train)[0], first(images.train, epoch=1)[0])


def test_parts_of_the_digits_do_not_overlap_and_the_subset_follows_the_seed():
    def shown(part):
        return {tuple(x.flatten().tolist()) for x in part.source.images}

    parts = [
        data.load(finetune.parse(["--seed", str(seed), "--subset-seed", subset]), CPU).train
        for seed, subset in ((0, "-1"), (1, "-1"), (1, "0"))
    ]
    assert all(len(p) == 100 for p in parts)
    assert shown(parts[0]) == shown(parts[2]) != shown(parts[1])
    everything = data.load(pretrain.parse([]), CPU).train
    order = torch.randperm(1797, generator=seeded("digits"))
    assert len(set(order.tolist())) == 1797 and len(everything) == 997


@pytest.mark.parametrize("counts", [(30, 30, 30), (50, 3, 20), (1, 0, 9)])
def test_labels_are_drawn_class_by_class(counts):
    """As evenly as the classes allow, for any number; more labels hold the fewer."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    before = set()
    for count in range(1, len(labels) + 1):
        drawn = data.class_by_class(labels, count, seeded("test"))
        found = torch.bincount(labels[drawn], minlength=3).tolist()
        assert len(set(drawn)) == count == sum(found) and before <= set(drawn)
        full = [label for label in range(3) if found[label] == counts[label]]
        others = [found[label] for label in range(3) if label not in full]
        if others:
            assert max(others) - min(others) <= 1
            assert all(counts[label] <= min(others) + 1 for label in full)
        before = set(drawn)
    if len(set(counts)) == 1:
        assert data.class_by_class(labels, 9, seeded("other")) != drawn[:9]


def test_the_labelled_digits_are_ten_of_each(small):
    for seed in range(3):
        labels = data.load(finetune.parse(["--seed", str(seed)]), CPU).train.source.labels
        assert torch.bincount(labels).tolist() == [10] * 10
    for memory in ("2", "0"):  # images in memory and in files: the same ones
        settings = finetune.parse([*small, "--num-labels", "7", "--memory", memory])
        labels = data.load(settings, CPU).train.source.labels
        assert sorted(torch.bincount(labels).tolist()) == [2, 2, 3]


def test_scraps_clutter_the_canvas_as_many_as_asked():
    """With none, the digit alone; each more covers pixels that were empty, in all three parts."""
    inked = []
    for scraps in ("0", "1", "3"):
        images = data.load(finetune.parse(["--scraps", scraps, "--num-labels", "0"]), CPU)
        batches = first(images.train)[0], next(images.val.in_order(300))[0]
        inked.append([(batch * 0.35 + 0.25 > 1e-3).float().mean().item() for batch in batches])
    assert all(none < one < three for none, one, three in zip(*inked, strict=True))
    pixels = torch.from_numpy(np.load(digits.FILE)["images"]) / 16
    alone = data.load(finetune.parse(["--scraps", "0"]), CPU).val.in_order(10)
    sums = (next(alone)[0] * 0.35 + 0.25).sum(dim=(1, 2, 3))
    for total in sums:
        assert (pixels.sum(dim=(1, 2)) - total).abs().min() < 1e-3


def test_an_epoch_can_be_entered_at_any_step(small):
    for memory in ("2", "0"):
        settings = finetune.parse(
            [*small, "--memory", memory, "--mixup", "0.8", "--randaugment", "9"]
        )
        part = data.load(settings, CPU).train
        whole = [images.clone() for images, _ in part.epoch(3)]
        assert len(whole) == 3
        for (images, labels), expected in zip(part.epoch(3, start=1), whole[1:], strict=True):
            assert torch.equal(images, expected)
            assert labels.shape == (8, 3)
            torch.testing.assert_close(labels.sum(1), torch.ones(8))


def test_workers_do_not_change_what_is_seen(small):
    seen = []
    for workers in ("0", "2"):
        settings = finetune.parse(
            [*small, "--memory", "0", "--workers", workers, "--random-erase", "0.5"]
        )
        seen.append(torch.cat([images for images, _ in data.load(settings, CPU).train.epoch(0)]))
    assert torch.equal(*seen)


def test_ranks_share_each_batch_and_each_evaluation_without_overlap(small, monkeypatch):
    for argv in (
        [],
        [*small, "--cutmix", "0", "--mixup", "0", "--random-erase", "0", "--randaugment", "0"],
    ):
        settings = finetune.parse(argv)
        part = data.load(settings, CPU).train
        images, labels = first(part)
        shares = []
        for rank in (0, 1):
            part.rank, part.world = rank, 2
            shares.append(first(part))
        assert torch.equal(torch.cat([s[0] for s in shares]), images)
        assert torch.equal(torch.cat([s[1] for s in shares]), labels)
        test = data.load(settings, CPU).test
        count = 0
        for rank in range(4):
            test.rank, test.world = rank, 4
            count += sum(len(labels) for _, labels in test.in_order(3))
        assert count == len(test)


def test_memory_and_workers_show_the_same_test_images(small):
    settings = finetune.parse([*small, "--memory", "0"])
    streamed = torch.cat([images for images, _ in data.load(settings, CPU).test.in_order(4)])
    settings = settings.but(memory=2.0)
    held = torch.cat([images for images, _ in data.load(settings, CPU).test.in_order(4)])
    # One resizes in float, the other in bytes before normalising: they may round differently.
    torch.testing.assert_close(streamed, held, atol=0.05, rtol=0)


class Given:
    """Draws that hand out given numbers instead of random ones."""

    def __init__(self, numbers):
        self.numbers = torch.tensor(numbers, dtype=torch.float32)

    def uniform(self, columns):
        return self.numbers[:, :columns]


def test_files_decode_to_pils_pixels_whatever_they_are_called(photos, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    paths = [
        next(photos.rglob("*.jpg")),
        tmp_path / "a png.jpg",
        tmp_path / "grey.jpeg",
        tmp_path / "palette.png",
    ]
    Image.fromarray(pixels).save(paths[1], format="png")
    Image.fromarray(pixels[..., 0]).save(paths[2])
    Image.fromarray(pixels).convert("P").save(paths[3])
    for path in paths:
        expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(image_files.decode(str(path)), expected), path
    with pytest.raises(OSError):
        (tmp_path / "broken.jpg").write_bytes(paths[0].read_bytes()[:200])
        image_files.decode(str(tmp_path / "broken.jpg"))


def test_shifts_and_flips_are_exact():
    images = torch.randn(3, 2, 16, 16)
    centre, left = (2 + 0.5) / 5, 0.1  # of 5 shifts (-2..2), the middle one and the first
    u = [[0, 0, centre, centre, 0.9], [0, 0, centre, centre, 0.1], [0, 0, left, centre, 0.9]]
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
    u = [[(0.25 - 0.08) / 0.92, 0.5, 0.0, 1.0, 0.9]]  # at the left and bottom edge
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


def test_normalisation_is_the_teachers(small):
    own = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    for memory in ("2", "0"):
        settings = finetune.parse([*small, "--memory", memory])
        usual, other = (next(data.load(settings, CPU, n).test.in_order(4))[0] for n in (None, own))
        mean, std = (torch.tensor(x)[:, None, None] for x in data.IMAGENET)
        torch.testing.assert_close((usual * std + mean - 0.5) / 0.5, other, atol=1e-5, rtol=1e-5)


def test_held_out_images_are_not_trained_on(small):
    for memory in ("2", "0"):
        settings = finetune.parse(
            [*small, "--num-labels", "0", "--holdout", "6", "--memory", memory]
        )
        images = data.load(settings, CPU)
        assert (len(images.train), len(images.val), len(images.test)) == (24, 6, 15)
        if memory == "0":
            assert not set(images.train.source.samples) & set(images.val.source.samples)


def test_cifar_as_torchvision_stores_it(tmp_path, monkeypatch):
    """A made-up CIFAR-10 in torchvision's own format, with the check sums of these files."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = {}
    for name in ("data_batch_1", "test_batch"):
        pixels[name] = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        (folder / name).write_bytes(
            pickle.dumps({"data": pixels[name], "labels": [i % 10 for i in range(20)]})
        )
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    kind = data.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", None]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
    settings = finetune.parse(["--data", "cifar10", "--data-dir", str(tmp_path), "--batch", "10"])
    images = data.load(settings, CPU)
    assert images.classes == list("abcdefghij") and len(images.train) == 20
    batch, labels = next(images.test.in_order(20))
    mean, std = (torch.tensor(x)[:, None, None] for x in images.normalization)
    expected = torch.from_numpy(pixels["test_batch"]).view(20, 3, 32, 32)
    assert torch.equal(((batch * std + mean) * 255).round().to(torch.uint8), expected)
    assert labels.tolist() == [i % 10 for i in range(20)]
    assert first(images.train)[0].shape == (10, 3, 32, 32)
    for script in (ensemble, analysis):  # which evaluate, and know no augmentation
        settings = script.parse(["A", "--data", "cifar10", "--data-dir", str(tmp_path)])
        images = data.load(settings.but(image_size=32), CPU, train=False)
        assert torch.equal(next(images.test.in_order(20))[0], batch)


def test_an_ensemble_averages_probabilities_over_the_classes_at_hand(small, photos, tmp_path):
    for seed in ("0", "1"):
        finetune.main(
            finetune.parse(
                [*small, "--teacher", "none", "--seed", seed, "--out", str(tmp_path / seed)]
            )
        )
    subset = tmp_path / "subset"
    subset.mkdir()
    for name in ("blue", "red"):  # two of the three classes, and no val/ around them
        (subset / name).symlink_to(photos / "val" / name)
    paths = [str(tmp_path / seed / "model.pt") for seed in ("0", "1")]
    settings = ensemble.parse(
        [
            *paths,
            "--data",
            "folder",
            "--data-dir",
            str(subset),
            "--json",
            str(tmp_path / "out.json"),
        ]
    )
    result = ensemble.main(settings)
    images = next(data.load(settings.but(image_size=16), CPU, train=False).test.in_order(100))
    total = 0
    for path, member in zip(paths, result["members"], strict=True):
        p = checkpoints.open_model(path)(images[0]).softmax(-1)[:, [0, 2]]
        p = p / p.sum(-1, keepdim=True)
        assert member["top1"] == pytest.approx(
            100 * (p.argmax(-1) == images[1]).float().mean().item()
        )
        total = total + p
    assert result["ensemble_top1"] == pytest.approx(
        100 * (total.argmax(-1) == images[1]).float().mean().item()
    )
    assert result["images"] == 10 and Path(tmp_path / "out.json").exists()


def test_a_copy_student_is_evaluated_with_its_teacher(tmp_path):
    out = tmp_path / "copy"
    argv = ["--teacher", "random", "--layers", "1-2", "--epochs", "30", "--warmup", "3"]
    ran = attention_copy.main(attention_copy.parse([*argv, "--out", str(out)]))
    found = ensemble.evaluate([str(out / "model.pt")], ensemble.parse(["x"]))
    assert found["members"][0]["top1"] == pytest.approx(ran["test_top1"], abs=1e-4)
    content = torch.load(out / "model.pt", weights_only=True)
    content.pop("teacher")  # without its teacher the same student sees less
    torch.save(content, out / "alone.pt")
    alone = ensemble.evaluate([str(out / "alone.pt")], ensemble.parse(["x"]))
    assert alone["members"][0]["top1"] != found["members"][0]["top1"]


def test_seeds_are_a_function_of_all_their_parts():
    numbers = {
        number(*parts) for parts in ((0, 1), (1, 0), (0, 1, 0), (0, 1, "a"), (0, 1, "b"), (1, 2))
    }
    assert len(numbers) == 6 and all(0 <= n < 2**56 for n in numbers)
