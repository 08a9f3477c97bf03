"""Folders of images as people have them, and that --memory changes no distribution."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import data
import finetune
import image_files
import image_folders
import pretrain
import runs
import subsets

CPU = torch.device("cpu")


def listed(root):
    return [path for path, _ in image_folders.listing(root).samples]


def picture(path, value=128, size=(20, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


@pytest.fixture
def unsplit(tmp_path):
    """CLASS/*, without train/ and val/: 20 images of one class, 10 of another."""
    for name, count in (("cat", 20), ("dog", 10)):
        for i in range(count):
            picture(tmp_path / "pets" / name / f"{i:02}.png", 5 * i)
    return tmp_path / "pets"


def folder(root, *argv, script=finetune):
    return script.parse(["--data", "folder", "--data-dir", str(root), *argv])


def test_without_val_a_fifth_of_each_class_is_held_out(unsplit):
    dataset = data.load(folder(unsplit), CPU)
    assert "24 to train on, 6 held out to validate and test on; 2 cl" in dataset.described(True)
    assert (len(dataset.train), len(dataset.test), dataset.val) == (24, 6, dataset.test)
    assert torch.bincount(dataset.test.source.labels).tolist() == [4, 2]
    seen = [data.load(folder(unsplit, *argv), CPU) for argv in ([], ["--memory", "0"])]
    batches = [next(dataset.test.in_order(6))[0] for dataset in seen]
    torch.testing.assert_close(*batches)  # the same ones, cropped alike
    whole = data.load(folder(unsplit).but(holdout=0), CPU, train=False)
    assert len(whole.test) == 30  # to evaluate another's model on all of them
    with pytest.raises(ValueError, match="no val/"):
        data.load(folder(unsplit, "--holdout", "0"), CPU)


def test_what_is_held_out_has_each_class_by_its_share():
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 30)
    order = subsets.stratified(labels, range(140))
    assert sorted(order) == list(range(140))
    more = subsets.stratified(torch.cat([labels, torch.tensor([1])]), range(141))
    assert len(set(order[:28]) ^ set(more[:28])) <= 2  # one image more changes hardly anything
    held = torch.bincount(labels[order[:28]], minlength=3)
    assert all(abs(n - expected) <= 1 for n, expected in zip(held, (20, 2, 6), strict=True))


def test_a_flat_folder_without_labels_is_enough_to_pretrain_on(tmp_path, failing):
    for i in range(20):
        picture(tmp_path / "flat" / f"{i}.png", 10 * i)
    dataset = data.load(folder(tmp_path / "flat", script=pretrain), CPU)
    assert len(dataset.train) == 16 and next(dataset.train.epoch(0))[0].shape == (2, 3, 96, 96)
    argv = ["--teacher", "none", "--data", "folder", "--data-dir", tmp_path / "flat"]
    code, line = failing(finetune, argv)
    assert code == 2 and "one class" in line


def test_hidden_folders_and_files_are_ignored(unsplit):
    before = listed(unsplit)
    for hidden in (".ipynb_checkpoints", "cat/.ipynb_checkpoints"):
        picture(unsplit / hidden / "copy.png")
    shutil.copy(unsplit / "cat" / "00.png", unsplit / "cat" / "._00.png")
    assert listed(unsplit) == before and len(before) == 30


def test_a_link_that_leads_back_is_refused(unsplit):
    (unsplit / "cat" / "more").symlink_to(unsplit / "dog")  # this one leads elsewhere
    assert len(listed(unsplit)) == 40
    (unsplit / "cat" / "again").symlink_to(unsplit)  # found out in again/cat, which is no link
    with pytest.raises(ValueError, match="cat/again is a link that leads back"):
        listed(unsplit)


def test_sixteen_bits_are_scaled_and_photographs_turned_upright(tmp_path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "of floats.tiff")
    with pytest.raises(ValueError, match="floating-point numbers: save it with 8 or 16 bits"):
        image_files.read(str(tmp_path / "of floats.tiff"))
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    expected = torch.from_numpy((ramp / 257).astype(np.uint8)).expand(3, 8, 8)
    assert torch.equal(image_files.decode(str(tmp_path / "deep.png")), expected)
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:, :8] = 255
    exif = Image.Exif()
    exif[274] = 6  # the camera was held on its side: turn it by 90 degrees to the right
    for name in ("side.jpg", "side.png"):
        Image.fromarray(upright).save(
            tmp_path / name, exif=exif, **({"quality": 95} if "j" in name else {})
        )
        turned = image_files.decode(str(tmp_path / name))
        assert turned.shape == (3, 32, 16)
        assert turned[:, :6].min() > 200 and turned[:, 10:].max() < 50


def test_memory_changes_nothing_that_is_seen_of_photographs(small, tmp_path):
    """Held or streamed, large or small, evaluated or trained on: the same pixels."""
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        for i in range(6):
            size = (300, 200) if i % 2 else (30, 50)
            folder_of = tmp_path / "photos" / name
            folder_of.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder_of / f"{i}.jpg")
    argv = ["--image-size", "32", "--holdout", "2", "--batch", "5", "--randaugment", "5"]
    for area in ("0", "0.2"):
        seen = {}
        for memory in ("2", "0"):
            asked = folder(tmp_path / "photos", *argv, "--crop-area", area, "--memory", memory)
            dataset = data.load(asked, CPU)
            assert bool(dataset.train.source.held) == (memory == "2")
            seen[memory] = [x for x, _ in dataset.train.epoch(3)]
            seen[memory] += [x for x, _ in dataset.val.in_order(2)]
        for held, streamed in zip(*seen.values(), strict=True):
            assert torch.equal(held, streamed)


@pytest.mark.parametrize("area", [0.0, 0.3])
def test_crops_of_squares_held_as_a_tensor_have_the_distribution_of_streamed_ones(area, tmp_path):
    """Of a ramp, a crop's mean tells where it lies, and its range how wide it is."""
    size, count = 32, 3000
    ramp = torch.arange(size).float() / size
    image = torch.stack(
        [ramp.expand(size, size), ramp[:, None].expand(size, size), ramp.new_ones(size, size)]
    )
    asked = folder(tmp_path, "--crop-area", str(area), "--random-erase", "0")
    draws = augment.Draws(augment.seeded("held"), count, slice(None), CPU)
    held = augment.crop_and_flip(image.expand(count, -1, -1, -1) - 0.5, draws, area) + 0.5
    crop = image_files.random_crop(size, asked, [0.5] * 3)
    torch.manual_seed(0)
    streamed = torch.stack([crop((255 * image).byte()) for _ in range(count)]) / 255

    def facts(crops):
        inner = crops[:, :, 4:-4, 4:-4]  # without what shifts pad
        yield from (inner[:, 0].mean((1, 2)), inner[:, 1].mean((1, 2)))
        width = inner[:, 0, :, -1].mean(1) - inner[:, 0, :, 0].mean(1)  # < 0 if flipped
        yield from (width.abs(), inner[:, 1, -1].mean(1) - inner[:, 1, 0].mean(1))
        assert (width < 0).float().mean() == pytest.approx(0.5, abs=0.04)

    for ours, theirs in zip(facts(held), facts(streamed), strict=True):
        assert (ours.sort().values - theirs.sort().values).abs().mean() < 0.01  # earth mover's


def test_unreadable_files_are_found_before_training_and_remembered(
    unsplit, tmp_path, monkeypatch, capsys
):
    """A batch of them, which lost most of an epoch when they were found in it: now none."""
    monkeypatch.chdir(tmp_path)
    whole = data.load(folder(unsplit, "--memory", "0"), CPU)
    held_out = {path for path, _ in whole.test.source.samples}
    bad = {str(unsplit / "cat" / f"{i:02}.png") for i in range(8)}
    for path in bad:
        open(path, "w").close()
    for memory in ("2", "0"):
        asked = folder(unsplit, "--skip-unreadable", "--memory", memory, "--batch", "4")
        dataset = data.load(asked, CPU)
        assert "unreadable image(s) left out" in capsys.readouterr().out
        assert len(dataset.train) == 24 - len(bad - held_out)
        assert len(dataset.test) == 6 - len(bad & held_out)
        batches = list(dataset.train.epoch(0))
        assert {len(x) for x, _ in batches} == {4} and len(batches) == len(dataset.train) // 4
    kept = {path for path, _ in dataset.test.source.samples}
    assert kept == held_out - bad  # what is held out does not depend on what can be read
    found = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("unreadable-*.json")]
    assert {path for part in found for path in part} == bad
    monkeypatch.setattr(image_files, "decode", lambda path: 1 / 0)  # not tried a second time
    assert len(data.load(asked, CPU).test) == len(kept)


def test_no_image_that_can_be_read_is_an_error_and_no_accuracy(
    unsplit, tmp_path, monkeypatch, failing
):
    monkeypatch.chdir(tmp_path)
    for path in listed(unsplit):
        open(path, "w").close()
    argv = ["--teacher", "none", "--data", "folder", "--data-dir", unsplit, "--skip-unreadable"]
    code, line = failing(finetune, argv)
    assert code == 2 and "none of 6 images can be read" in line
    with pytest.raises(ValueError, match="to evaluate on, for 1 process"):
        data.Eval(data.Tensors(torch.zeros(0, 1), torch.zeros(0)), lambda x: x, CPU)


def test_what_breaks_after_the_trial_ends_the_run(unsplit, tmp_path, monkeypatch, failing):
    monkeypatch.chdir(tmp_path)
    argv = [
        "--teacher",
        "none",
        "--data",
        "folder",
        "--data-dir",
        unsplit,
        "--skip-unreadable",
        "--memory",
        "0",
    ]
    honest = data.to_train

    def breaks(source, device):
        Path(source.samples[5][0]).write_text("broken since")
        return honest(source, device)

    monkeypatch.setattr(data, "to_train", breaks)
    code, line = failing(finetune, [*argv, "--epochs", "1", "--warmup", "0"])
    assert code == 2 and "cannot read image" in line
    assert not list(tmp_path.rglob("model.pt"))


def test_other_names_of_the_parts_are_known(unsplit, capsys):
    (unsplit / "Training").mkdir()
    for name in ("cat", "dog"):
        (unsplit / name).rename(unsplit / "Training" / name)
    shutil.copytree(unsplit / "Training", unsplit / "test")
    (unsplit / "test" / "cat" / "notes.txt").write_text("no picture")
    dataset = data.load(folder(unsplit), CPU)
    assert (dataset.classes, len(dataset.train), len(dataset.test)) == (["cat", "dog"], 30, 30)
    assert "1 files are no images of a known kind" in capsys.readouterr().out
    shutil.copytree(unsplit / "test", unsplit / "valid")
    picture(unsplit / "Training" / "stray.png")
    data.load(folder(unsplit), CPU)
    said = capsys.readouterr().out
    assert "1 files beside the classes are left out" in said and "stray.png" in said
    assert f"{unsplit / 'valid'} is used, and {unsplit / 'test'} is not" in said


def test_other_images_of_the_same_names_are_another_run(unsplit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = data.load(folder(unsplit), CPU)
    moved = shutil.copytree(unsplit, tmp_path / "moved")
    assert data.load(folder(moved), CPU).fingerprint == before.fingerprint != ""
    for path in listed(moved):
        picture(Path(path), 9, (40, 31))
    after = data.load(folder(moved), CPU)
    asked = folder(unsplit)
    runs_of = [runs.identity("scratch", images, None, asked) for images in (before, after)]
    odd = runs.differences(*runs_of)
    assert [words.split()[0] for words in odd] == ["images_fingerprint", "tested_on"]


def test_an_image_is_named_by_its_place_below_the_folder_whatever_that_is_called(tmp_path):
    for name in ("A/x/1.png", "A/y/1.png", "B/z/1.png", "flat/1.png", "flat/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(tmp_path / name)
    of = {}
    for root, names in (
        ("", ("A/x/1.png", "A/y/1.png", "B/z/1.png")),
        ("flat", ("1.png", "2.png")),
    ):
        files = image_files.Files([(str(tmp_path / root / n), 0) for n in names], 16,
                                  data.KINDS["folder"], folder(tmp_path), False)  # fmt: skip
        assert files.names == list(names)
        of[root] = files.fingerprint
    (tmp_path / "B" / "y").parent.mkdir(exist_ok=True)
    (tmp_path / "A" / "y").rename(tmp_path / "B" / "y")
    moved = [(str(tmp_path / n), 0) for n in ("A/x/1.png", "B/y/1.png", "B/z/1.png")]
    files = image_files.Files(moved, 16, data.KINDS["folder"], folder(tmp_path), False)
    assert files.fingerprint != of[""]


def test_a_class_may_be_called_as_a_part_is(unsplit):
    (unsplit / "cat").rename(unsplit / "train")
    dataset = data.load(folder(unsplit), CPU)
    assert dataset.classes == ["dog", "train"] and len(dataset.train) + len(dataset.test) == 30


def test_a_class_of_which_nothing_can_be_read_is_an_error(unsplit, tmp_path, monkeypatch, failing):
    monkeypatch.chdir(tmp_path)
    for path in listed(unsplit)[20:]:
        open(path, "w").close()
    argv = ["--teacher", "none", "--data", "folder", "--data-dir", unsplit, "--skip-unreadable"]
    code, line = failing(finetune, argv)
    assert code == 2 and "of a class no image can be read" in line and "dog" in line
    for path in listed(unsplit)[20:]:
        os.unlink(path)
        os.symlink("nowhere", path)  # links to nothing are no more
    code, line = failing(finetune, argv)
    assert code == 2 and "of a class no image can be read" in line
