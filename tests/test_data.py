"""The data paths against plain computations and against each other."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

import data
import ensemble
import finetune
import pretrain
from common import digits, images
from common.augment import seeded


@pytest.fixture(params=["held", "streamed"])
def storage(request, monkeypatch):
    """Image files, decoded once or again and again."""
    if request.param == "streamed":
        monkeypatch.setattr(images, "HELD", 0)


def first(part, epoch=0, start=0):
    return next(part.epoch(epoch, start))


def test_digits_are_placed_whole_and_anew_each_step_and_fixed_for_validation_and_test():
    settings = finetune.parse(["--num-labels", "0"])
    dataset = data.load(settings)
    assert [len(p) for p in (dataset.train, dataset.val, dataset.test)] == [997, 1200, 2000]
    pixels = torch.from_numpy(np.load(digits.FILE)["images"]) / 16
    for batch, labels in (first(dataset.train), next(dataset.test.in_order(50))):
        canvas = (batch * 0.35 + 0.25)[:, 0]
        assert batch.shape == (50, 1, 12, 12) and labels.shape == (50,)
        windows = canvas.unfold(1, 8, 1).unfold(2, 8, 1)  # (B, 5, 5, 8, 8): each place
        for one in windows[:10]:  # some real digit lies somewhere, nothing on it is darker
            inside = (one[:, :, None] >= pixels - 1e-5).all(-1).all(-1)
            assert inside.any()
    again = data.load(settings)
    assert torch.equal(first(dataset.train)[0], first(again.train)[0])
    assert torch.equal(dataset.test.source.images, again.test.source.images)
    assert not torch.equal(first(dataset.train)[0], first(dataset.train, epoch=1)[0])


def test_parts_of_the_digits_do_not_overlap_and_the_subset_follows_the_seed():
    def shown(part):
        return {tuple(x.flatten().tolist()) for x in part.source.images}

    parts = [
        data.load(finetune.parse(["--seed", str(seed), "--subset-seed", subset])).train
        for seed, subset in ((0, "-1"), (1, "-1"), (1, "0"))
    ]
    assert all(len(p) == 100 for p in parts)
    assert shown(parts[0]) == shown(parts[2]) != shown(parts[1])
    everything = data.load(pretrain.parse([])).train
    order = torch.randperm(1797, generator=seeded("digits"))
    assert len(set(order.tolist())) == 1797 and len(everything) == 997


@pytest.mark.parametrize("counts", [(30, 30, 30), (50, 3, 20), (1, 0, 9)])
def test_labels_are_drawn_class_by_class(counts):
    """As evenly as the classes allow, for any number; more labels hold the fewer."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    source, before = data.Tensors(torch.arange(len(labels)), labels), set()

    def draw(count, seed=0):
        settings = replace(finetune.parse([]), num_labels=count, seed=seed)
        return data.draw_labels(source, settings).images.tolist()

    for count in range(1, len(labels) + 1):
        drawn = draw(count)
        found = torch.bincount(labels[drawn], minlength=3).tolist()
        assert len(set(drawn)) == count == sum(found) and before <= set(drawn)
        full = [label for label in range(3) if found[label] == counts[label]]
        others = [found[label] for label in range(3) if label not in full]
        if others:
            assert max(others) - min(others) <= 1
            assert all(counts[label] <= min(others) + 1 for label in full)
        before = set(drawn)
    assert set(draw(9)) != set(draw(9, seed=1)) or len(labels) < 11


def test_the_labelled_digits_are_ten_of_each():
    for seed in range(3):
        labels = data.load(finetune.parse(["--seed", str(seed)])).train.source.labels
        assert torch.bincount(labels).tolist() == [10] * 10


def test_distractors_clutter_the_canvas_as_many_as_asked():
    """With none, the digit alone; each more covers pixels that were empty, in all three parts."""
    inked = []
    for distractors in ("0", "1", "3"):
        dataset = data.load(finetune.parse(["--distractors", distractors, "--num-labels", "0"]))
        batches = first(dataset.train)[0], next(dataset.val.in_order(300))[0]
        inked.append([(batch * 0.35 + 0.25 > 1e-3).float().mean().item() for batch in batches])
    assert all(none < one < three for none, one, three in zip(*inked, strict=True))
    pixels = torch.from_numpy(np.load(digits.FILE)["images"]) / 16
    alone = data.load(finetune.parse(["--distractors", "0"])).val.in_order(10)
    sums = (next(alone)[0] * 0.35 + 0.25).sum(dim=(1, 2, 3))
    for total in sums:
        assert (pixels.sum(dim=(1, 2)) - total).abs().min() < 1e-3


def test_an_epoch_can_be_entered_at_any_step(small, storage):
    part = data.load(finetune.parse([*small, "--mixup", "0.8", "--randaugment", "9"])).train
    whole = [images.clone() for images, _ in part.epoch(3)]
    assert len(whole) == 3
    for (batch, labels), expected in zip(part.epoch(3, start=1), whole[1:], strict=True):
        assert torch.equal(batch, expected)
        assert labels.shape == (8, 3)
        torch.testing.assert_close(labels.sum(1), torch.ones(8))


def test_workers_do_not_change_what_is_seen(small, monkeypatch):
    monkeypatch.setattr(images, "HELD", 0)
    seen = []
    for workers in ("0", "2"):
        settings = finetune.parse([*small, "--workers", workers, "--random-erase", "0.5"])
        seen.append(torch.cat([images for images, _ in data.load(settings).train.epoch(0)]))
    assert torch.equal(*seen)


def test_ranks_share_each_batch_and_each_evaluation_without_overlap(small, monkeypatch):
    for argv in ([], [*small, *"--cutmix 0 --mixup 0 --random-erase 0".split()]):
        settings = finetune.parse(argv)
        part = data.load(settings).train
        images, labels = first(part)
        shares = []
        for rank in (0, 1):
            part.rank, part.world = rank, 2
            shares.append(first(part))
        assert torch.equal(torch.cat([s[0] for s in shares]), images)
        assert torch.equal(torch.cat([s[1] for s in shares]), labels)
        test = data.load(settings).test
        count = 0
        for rank in range(4):
            test.rank, test.world = rank, 4
            count += sum(len(labels) for _, labels in test.in_order(3))
        assert count == len(test)


def test_files_decode_to_pils_pixels_whatever_they_are_called(photos, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    names = ("a png.jpg", "grey.jpeg", "palette.png")
    paths = [next(photos.rglob("*.jpg")), *(tmp_path / name for name in names)]
    Image.fromarray(pixels).save(paths[1], format="png")
    Image.fromarray(pixels[..., 0]).save(paths[2])
    Image.fromarray(pixels).convert("P").save(paths[3])
    for path in paths:
        expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(images.decode(str(path)), expected), path
    with pytest.raises(OSError):
        (tmp_path / "broken.jpg").write_bytes(paths[0].read_bytes()[:200])
        images.decode(str(tmp_path / "broken.jpg"))


def test_normalisation_is_the_teachers(small, storage):
    own = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    dataset = data.load(finetune.parse(small))
    usual, _ = next(dataset.test.in_order(4))
    dataset.set_normalization(own)
    other, _ = next(dataset.test.in_order(4))
    mean, std = (torch.tensor(x)[:, None, None] for x in data.IMAGENET)
    torch.testing.assert_close((usual * std + mean - 0.5) / 0.5, other, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="1 channels, these have 3"):
        dataset.set_normalization(([0.5], [0.5]))


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
    kind = datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", None]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
    settings = finetune.parse(["--data", "cifar10", "--data-dir", str(tmp_path), "--batch", "10"])
    dataset = data.load(settings)
    assert dataset.classes == list("abcdefghij") and len(dataset.train) == 20
    batch, labels = next(dataset.test.in_order(20))
    mean, std = (torch.tensor(x)[:, None, None] for x in dataset.normalization)
    expected = torch.from_numpy(pixels["test_batch"]).view(20, 3, 32, 32)
    assert torch.equal(((batch * std + mean) * 255).round().to(torch.uint8), expected)
    assert labels.tolist() == [i % 10 for i in range(20)]
    assert first(dataset.train)[0].shape == (10, 3, 32, 32)
    settings = ensemble.parse(["A", "--data", "cifar10", "--data-dir", str(tmp_path)])
    dataset = data.load(replace(settings, image_size=32, holdout=0), train=False)
    assert torch.equal(next(dataset.test.in_order(20))[0], batch)  # without any augmentation
