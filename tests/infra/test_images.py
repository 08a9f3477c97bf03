"""Folders of images as people have them; and it does not matter whether memory holds them."""

import shutil
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

import data
import finetune
import pretrain
from common import augment, launch
from datasets import folders, images

CAFE = "caf\u00e9"  # of four characters, not five


def picture(path, value=128, size=(20, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


@pytest.fixture
def unsplit(tmp_path):
    """CLASS/*, without train/ and val/: 20 images of one class, 10 of another."""
    for name, count in ((CAFE, 20), ("dog", 10)):
        for i in range(count):
            picture(tmp_path / "pets" / name / f"{i:02}.png", 5 * i)
    return tmp_path / "pets"


def folder(root, *argv, script=finetune):
    return script.parse(["--data", "folder", "--data-dir", str(root), *argv])


def names_of(part) -> set[str]:
    return set(part.source.names)


def held_out(root) -> set[str]:
    return names_of(data.load(folder(root)).test)


def test_what_is_held_out_depends_on_names_alone(unsplit, tmp_path, monkeypatch, capsys):
    """Not on where the folder is, how its disk writes names, or which other images there are."""
    dataset, before = data.load(folder(unsplit)), held_out(unsplit)
    assert before and dataset.val is dataset.test
    assert len(dataset.train) + len(before) == 30
    assert not before & names_of(dataset.train)
    moved = shutil.copytree(unsplit, tmp_path / "moved")
    for name in (".ipynb_checkpoints", "@eaDir/1.jpg", "__MACOSX", "Thumbs", "$RECYCLE.BIN"):
        picture(moved / name / "copy.png")
        picture(moved / "dog" / name / "copy.png")
    monkeypatch.chdir(moved)
    assert held_out(moved) == held_out(".") == before
    assert "note: 8 folders ignored" in capsys.readouterr().out
    assert data.load(folder(moved)).fingerprint == dataset.fingerprint
    shutil.copy(next(unsplit.rglob("*1.png")), next(moved.rglob("*2.png")))  # under an older name
    assert data.load(folder(moved)).fingerprint != dataset.fingerprint
    (moved / CAFE).rename(moved / unicodedata.normalize("NFD", CAFE))
    assert held_out(moved) == before
    for path in moved.rglob("*4.png"):
        path.unlink()
    assert held_out(moved) == {name for name in before if not name.endswith("4.png")} < before
    for i in range(30):
        picture(moved / "ape" / f"{i}.png")
    assert {name for name in held_out(moved) if name[:3] != "ape"} < before
    assert data.load(folder(moved)).fingerprint != dataset.fingerprint


def test_a_share_of_the_training_images_is_held_out_beside_val(small, photos):
    argv = [*small, "--num-labels", "0", "--holdout", "0.2"]
    dataset = data.load(finetune.parse(argv))
    assert len(dataset.train) + len(dataset.val) == 30 and len(dataset.test) == 15
    assert not names_of(dataset.train) & names_of(dataset.val)
    whole = finetune.parse([*argv, "--data-dir", str(photos / "train"), "--holdout", "0"])
    assert len(data.load(whole, train=False).test) == 30  # to evaluate on all of a folder


def test_evaluation_opens_no_image_to_train_on(small, capsys):
    data.load(finetune.parse(small), train=False)
    assert capsys.readouterr().out == "looking through 15 images\n"


def test_a_flat_folder_without_labels_is_enough_to_pretrain_on(tmp_path, failing):
    for i in range(20):
        picture(tmp_path / f"{i}.png", 10 * i)
    assert len(data.load(folder(tmp_path, script=pretrain)).train) > 10
    argv = f"--teacher none --data folder --data-dir {tmp_path} --out run".split()
    failing(finetune, argv, "one class")
    for i in range(20):  # train/* and val/* are parts, not classes
        picture(tmp_path / "parts" / ("val" if i < 5 else "train") / f"{i}.png")
    dataset = data.load(folder(tmp_path / "parts", script=pretrain))
    assert (len(dataset.train), len(dataset.test)) == (15, 5)


@pytest.mark.parametrize("name", ["notes.txt", "unreadable.png", "0.png"])  # the last is held out
def test_a_class_without_an_image_to_train_on_is_named(name, unsplit, failing):
    picture(path := unsplit / "zebra" / "0.png")
    if name != "0.png":
        path.write_text("none yet")
    path.rename(path.with_name(name))
    argv = ["--teacher", "none", "--data", "folder", "--data-dir", unsplit]
    failing(finetune, argv, "1 of 3 classes", "zebra")


@pytest.mark.parametrize("names", [
    "val/1.png", "val/dog/1.png val/1.png", "extra/1.png", "1.png", "extra/more/1.png",
    "val/dog/1.png valid/dog/1.png", "../pets/val/dog/1.png", "../pets/Test/1.png",
    "../my_train/dog/1.png ../my_test2/dog/1.png",
])  # fmt: skip
def test_images_that_would_be_ignored_or_learned_by_mistake_are_refused(names, tmp_path, failing):
    for name in ("train/cat/1.png", "train/dog/1.png", *names.split()):
        picture(tmp_path / "photos" / "pets" / name)
    root = tmp_path / "photos" / ("" if names[0] == "." else "pets")
    named = "my_test2" if "my" in names else tmp_path / "photos" / "pets"
    failing(pretrain, ["--data", "folder", "--data-dir", root], named)


def test_repeats_are_counted_whatever_they_are_called(unsplit):
    for path in list(unsplit.rglob("*.png")):
        shutil.copy(path, path.with_stem(f"{path.stem} (1)"))
    dataset = data.load(folder(unsplit))
    parts = map(names_of, (dataset.train, dataset.test))
    learned, test = ([(unsplit / name).read_bytes() for name in part] for part in parts)
    repeats = sum(one in learned for one in test)
    assert dataset.count_learned(dataset.train.source.contents) == repeats > 0
    assert f"{repeats} of these {len(test)}" in dataset.describe(True)


def test_files_decode_to_pils_pixels_whatever_they_are_called(photos, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a png.jpg", format="png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.jpeg")
    Image.fromarray(pixels).convert("P").save(tmp_path / "palette.png")
    for path in (next(photos.rglob("*.jpg")), *tmp_path.iterdir()):
        expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(images.read_image(str(path)), expected), path


def test_photographs_are_turned_upright_and_transparent_ones_are_on_grey(tmp_path):
    for value in (0, 255):  # a shape of one colour, on transparent ground
        shape = np.full((8, 8, 4), value, np.uint8)
        shape[..., 3] = 255 * (np.arange(8) > 3)[:, None]
        Image.fromarray(shape).save(tmp_path / "shape.png")
        seen = images.read_image(str(tmp_path / "shape.png"))
        assert (seen[:, 4:] == value).all() and (seen[:, :4].int() - value).abs().min() > 99
    upright, exif = np.zeros((16, 32, 3), np.uint8), Image.Exif()
    upright[:, :8] = 255
    exif[274] = 6  # the camera was held on its side: turn it by 90 degrees to the right
    for name in ("side.jpg", "side.png", "xmp.jpg"):
        Image.fromarray(upright).save(tmp_path / name, exif=exif)
        if name == "xmp.jpg":  # as some editors write it: another APP1 comes first
            whole, xmp = (tmp_path / name).read_bytes(), b"http://ns.adobe.com/xap/1.0/\0<x/>"
            first = b"\xff\xe1" + (2 + len(xmp)).to_bytes(2, "big") + xmp
            (tmp_path / name).write_bytes(whole[:2] + first + whole[2:])
        turned = images.read_image(str(tmp_path / name))
        assert turned.shape == (3, 32, 16)
        assert turned[:, :6].min() > 200 and turned[:, 10:].max() < 50


@pytest.mark.parametrize("kind, name", [
    (np.float32, "x.tiff"), (np.int32, "x.tiff"), (np.uint16, "x.tiff"), (np.uint16, "x.png"),
])  # fmt: skip
def test_pixels_of_more_than_eight_bits_are_not_cut_off(kind, name, tmp_path):
    Image.fromarray(np.full((8, 8), 4095, kind)).save(tmp_path / name)
    with pytest.raises(ValueError, match="8 bits"):
        images.read_image(str(tmp_path / name))
    assert isinstance(images.examine(str(tmp_path / name)), str)


def test_scenes_of_photographs_are_known_by_their_files(tmp_path):
    for i in range(90):
        picture(tmp_path / ("train", "train", "val")[i % 3] / "abc"[i // 30] / f"{i}.png", i)
    argv = f"--data scenes-cifar10 --data-dir {tmp_path} --classes :3".split()
    few, known = (data.load(finetune.parse([*argv, "--num-labels", n])) for n in ("90", "0"))
    assert known.fingerprint and few.train.source.contents.equal(known.train.source.contents)
    shutil.rmtree(tmp_path / "val" / "c")
    with pytest.raises(ValueError, match="some class has too few test images"):
        data.load(finetune.parse(argv))


@pytest.mark.parametrize("area", ["0", "0.2"])
def test_memory_changes_nothing_that_is_seen_of_photographs(area, tmp_path, monkeypatch):
    """Held, or streamed by workers, large or small, to evaluate or train: the same pixels."""
    rng = np.random.default_rng(0)
    for i in range(20):
        size = (300, 200) if i % 2 else (30, 50)
        picture(path := tmp_path / "photos" / str(i % 3) / f"{i}.jpg")
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    argv = f"--image-size 32 --batch 5 --randaugment 5 --crop-area {area} --workers 2".split()
    seen = []
    for limit in (images.CACHE, 0):
        monkeypatch.setattr(images, "CACHE", limit)
        dataset = data.load(folder(tmp_path / "photos", *argv))
        assert bool(dataset.train.source.kept) == bool(limit)
        seen.append([x for x, _ in dataset.train.epoch(3)])
        seen[-1] += [x for x, _ in dataset.val.in_order(2)]
    for held, streamed in zip(*seen, strict=True):
        assert torch.equal(held, streamed)


@pytest.mark.parametrize("area, flip", [(0.0, 0.5), (0.3, 0.2)])
def test_crops_of_squares_in_memory_have_the_distribution_of_streamed_ones(area, flip, tmp_path):
    """Of a ramp, a crop's mean tells where it lies, and its range how wide it is."""
    size, count = 32, 3000
    ramp = (torch.arange(size) / size).expand(size, size)
    image = torch.stack([ramp, ramp.mT, torch.ones_like(ramp)])
    asked = folder(tmp_path, "--crop-area", str(area), "--flip", str(flip))
    draws = augment.BatchRandom(augment.seeded("held"), count, slice(None), image.device)
    held = augment.crop_and_flip(image.expand(count, -1, -1, -1) - 0.5, draws, area, flip) + 0.5
    crop = images.random_crop(size, asked, [0.5] * 3)
    torch.manual_seed(0)
    streamed = torch.stack([crop((255 * image).byte()) for _ in range(count)]) / 255

    def facts(crops):  # sorted: places, then widths; and how many are flipped
        inner = crops[:, :2, 4:-4, 4:-4]  # without what shifts pad
        across = inner[:, 0, :, -1].mean(1) - inner[:, 0, :, 0].mean(1)  # < 0 if flipped
        down = inner[:, 1, -1].mean(1) - inner[:, 1, 0].mean(1)
        assert (across < 0).float().mean() == pytest.approx(flip, abs=0.04)
        return torch.stack([*inner.mean((2, 3)).T, across.abs(), down]).sort().values

    assert (facts(held) - facts(streamed)).abs().mean(dim=1).max() < 0.01  # earth mover's


def test_what_cannot_be_read_is_left_out_and_named(unsplit, capsys, failing, monkeypatch):
    """The other images stay in the part they were in. Memory makes no difference."""
    before = held_out(unsplit)
    bad = {f"dog/{i:02}.png" for i in range(6)}
    for name in bad:
        (unsplit / name).write_bytes(b"")
    dataset = data.load(folder(unsplit))
    assert "left out: cannot read image" in capsys.readouterr().out
    assert names_of(dataset.test) == before - bad and not bad & names_of(dataset.train)
    assert len(dataset.train) + len(dataset.test) == 24
    monkeypatch.setattr(images, "CACHE", 0)
    streamed = data.load(folder(unsplit, "--workers", "1"))
    assert names_of(streamed.train) == names_of(dataset.train)
    assert streamed.fingerprint == dataset.fingerprint
    for path in unsplit.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="worker") as met:  # which meets it in training
        next(streamed.train.epoch(0))
    text, code = launch.describe_error(met.value)
    assert code == 2 and text.startswith("cannot read image")
    failing(finetune, ["--data", "folder", "--data-dir", unsplit], "cannot read image")


def test_parts_have_several_names_and_may_lack_classes(unsplit, capsys):
    """Validated on val/, tested on test/. A class is the same in each part, however written."""
    root = unsplit.parent / "split"
    for name in ("Training", "test", "valid"):
        shutil.copytree(unsplit, root / name)
    (root / "test" / "dog" / "notes.txt").write_text("no picture")
    (root / "test" / CAFE).rename(root / "test" / unicodedata.normalize("NFD", CAFE))
    shutil.rmtree(root / "valid" / CAFE)
    dataset, said = data.load(folder(root)), capsys.readouterr().out
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [30, 10, 30]
    assert "1 files are not images of a known kind" in said
    assert torch.bincount(dataset.test.source.labels).tolist() == [20, 10]
    assert torch.bincount(dataset.val.source.labels).tolist() == [0, 10]
    shutil.rmtree(root / "test")
    dataset = data.load(folder(root))
    assert dataset.val is dataset.test and "1 of them without a test" in dataset.describe(True)


def test_folders_within_a_class_count_for_it(unsplit):
    plain = folders.list_images(unsplit)
    for path in list(unsplit.rglob("*.png")):
        inner = path.parent / ("day" if path.stem < "05" else "night")
        inner.mkdir(exist_ok=True)
        path.rename(inner / path.name)
    deep = folders.list_images(unsplit)
    assert deep.names[0] == f"{CAFE}/day/00.png" and deep.classes == plain.classes
    assert deep.labels == plain.labels
