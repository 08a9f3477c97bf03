"""The data paths against plain computations and against each other."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from torchvision import datasets

import data
import ensemble
import finetune
from datasets import digits, images, sources


def first(part, epoch=0, start=0):
    return next(part.epoch(epoch, start))


def test_digits_are_placed_whole_and_anew_each_step_and_fixed_for_validation_and_test():
    settings = finetune.parse(["--data", "digits", "--num-labels", "0"])
    dataset = data.load(settings)
    assert [len(p) for p in (dataset.train, dataset.val, dataset.test)] == [997, 1200, 2000]
    pixels = torch.from_numpy(np.load(Path(digits.__file__).with_suffix(".npz"))["images"]) / 16
    for batch, labels in (first(dataset.train), next(dataset.test.in_order(50))):
        canvas = batch[:, 0]
        assert batch.shape == (50, 1, 12, 12) and labels.shape == (50,)
        windows = canvas.unfold(1, 8, 1).unfold(2, 8, 1)  # (B, 5, 5, 8, 8): each place
        for one in windows[:10]:  # some real digit lies somewhere, nothing on it is darker
            assert (one[:, :, None] >= pixels - 1e-5).all(-1).all(-1).any()
    again = data.load(settings)
    assert torch.equal(first(dataset.train)[0], first(again.train)[0])
    assert torch.equal(dataset.test.source.images, again.test.source.images)
    assert not torch.equal(first(dataset.train)[0], first(dataset.train, epoch=1)[0])


def test_the_labelled_digits_follow_the_seed_and_are_ten_of_each():
    shown = []
    for argv in ("", "--seed 1", "--seed 1 --subset-seed 0"):
        source = data.load(finetune.parse(["--data", "digits", *argv.split()])).train.source
        assert torch.bincount(source.labels).tolist() == [10] * 10
        shown.append({tuple(x.flatten().tolist()) for x in source.images})
    assert shown[0] == shown[2] != shown[1]


@pytest.mark.parametrize("counts", [(30, 30, 30), (50, 3, 20), (1, 0, 9)])
def test_labels_are_drawn_class_by_class(counts):
    """As evenly as the classes allow, for any number; more labels hold the fewer."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    source, before = sources.Tensors(torch.arange(len(labels)), labels), set()

    def draw(count, seed=0):
        return sources.draw_labels(source, count, seed).images.tolist()

    for count in range(1, len(labels) + 1):
        drawn = draw(count)
        found = torch.bincount(labels[drawn], minlength=3).tolist()
        assert len(set(drawn)) == count == sum(found) and before <= set(drawn)
        fewest = min((n for n, all_of in zip(found, counts, strict=True) if n < all_of), default=99)
        assert max(found) <= fewest + 1
        before = set(drawn)
    assert set(draw(9)) != set(draw(9, seed=1)) or len(labels) < 11


@pytest.mark.parametrize("held", [images.CACHE, 0])  # image files, decoded once or each time
def test_an_epoch_can_be_entered_at_any_step(held, small, monkeypatch):
    monkeypatch.setattr(images, "CACHE", held)
    part = data.load(finetune.parse([*small, "--mixup", "0.8", "--randaugment", "9"])).train
    whole = [batch.clone() for batch, _ in part.epoch(3)]
    assert len(whole) == 3
    for (batch, labels), expected in zip(part.epoch(3, start=1), whole[1:], strict=True):
        assert torch.equal(batch, expected)
        torch.testing.assert_close(labels.sum(1), torch.ones(8))


def test_ranks_share_each_batch_and_each_evaluation_without_overlap(small):
    for argv in (["--data", "digits"], [*small, *"--cutmix 0 --mixup 0 --random-erase 0".split()]):
        settings = finetune.parse(argv)
        part = data.load(settings).train
        batch, shares, test, count = first(part), [], data.load(settings).test, 0
        for part.rank in (0, 1):
            part.world = 2
            shares.append(first(part))
        for whole, *halves in zip(batch, *shares, strict=True):
            assert torch.equal(torch.cat(halves), whole)
        for test.rank in range(4):
            test.world = 4
            count += sum(len(labels) for _, labels in test.in_order(3))
        assert count == len(test)


def test_ranks_augment_with_numbers_of_their_own(small):
    part, drawn = data.load(finetune.parse([*small, "--mixup", "0", "--cutmix", "0"])).train, []
    part.augment = lambda images, draws: torch.rand(3)
    for part.rank in (0, 1, 0):
        part.world = 2
        drawn.append(first(part)[0])
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


def make_cifar(tmp_path, monkeypatch, images=20):
    """The pixels of a made-up CIFAR-10 in torchvision's own format, and arguments that load it."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = rng.integers(0, 256, (images, 3072), dtype=np.uint8)
    for name, seen in (("data_batch_1", pixels), ("test_batch", pixels[::-1])):
        content = {"data": seen, "labels": [i % 10 for i in range(images)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    kind = datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", None]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
    return pixels, ["--data", "cifar10", "--data-dir", str(tmp_path), "--num-labels", "0"]


def test_scenes_of_photographs_show_averaged_training_images(tmp_path, monkeypatch):
    pixels, argv = make_cifar(tmp_path, monkeypatch, 400)
    argv += "--data scenes-cifar10 --classes 2,5 --num-labels 0 --label".split()
    views = (data.load(finetune.parse([*argv, label])) for label in ("cell", "class"))
    asked, of_class = (view.train.source for view in views)
    cells = rearrange(asked.images[:200], "b c (h p) (w q) -> b (h w) (c p q)", h=3, w=3)
    shown = cells[torch.arange(200), asked.labels[:200]]
    photos = torch.from_numpy(pixels).view(-1, 3, 8, 4, 8, 4) / 255
    photos = photos.mean(dim=(3, 5)).flatten(1)
    number = torch.cdist(shown, photos).argmin(dim=1)
    torch.testing.assert_close(shown, photos[number])
    assert torch.equal(number % 10, torch.tensor([2, 5])[of_class.labels[:200]])


def test_cifar_as_torchvision_stores_it(tmp_path, monkeypatch):
    pixels, argv = make_cifar(tmp_path, monkeypatch)
    dataset = data.load(finetune.parse([*argv, "--batch", "10"]))
    assert dataset.classes == list("abcdefghij") and len(dataset.train) == 20
    batch, labels = next(dataset.test.in_order(20))
    expected = torch.from_numpy(pixels).flip(0).view(20, 3, 32, 32)
    assert torch.equal((batch * 255).round().to(torch.uint8), expected)
    assert labels.tolist() == [i % 10 for i in range(20)]
    assert first(dataset.train)[0].shape == (10, 3, 32, 32)
    settings = replace(ensemble.parse(["A", *argv[:4]]), image_size=32, holdout=0)
    dataset = data.load(settings, train=False)
    assert torch.equal(next(dataset.test.in_order(20))[0], batch)  # without any augmentation
