"""Evaluation of checkpoints, alone and averaged."""

from launch import Failed

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import attention_copy
import checkpoints
import data
import ensemble
import finetune
import image_folders
import storage
import vit

CPU = torch.device("cpu")


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
    dataset = next(
        data.load(settings.but(image_size=16, holdout=0), CPU, train=False).test.in_order(100)
    )
    total = 0
    for path, member in zip(paths, result["members"], strict=True):
        p = checkpoints.open_model(path)(dataset[0]).softmax(-1)[:, [0, 2]]
        p = p / p.sum(-1, keepdim=True)
        assert member["top1"] == pytest.approx(
            100 * (p.argmax(-1) == dataset[1]).float().mean().item()
        )
        total = total + p
    assert result["ensemble_top1"] == pytest.approx(
        100 * (total.argmax(-1) == dataset[1]).float().mean().item()
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


def test_the_images_are_those_that_a_checkpoint_was_trained_for(small, photos, tmp_path, failing):
    """Data set, folder and held-out part come from the file; what is asked for goes before it."""
    held = str(tmp_path / "held")
    argv = [*small, "--teacher", "none", "--num-labels", "0", "--out", held]
    ran = finetune.main(finetune.parse([*argv, "--data-dir", str(photos / "train")]))
    found = ensemble.main(ensemble.parse([f"{held}/model.pt", "--json", f"{held}/e.json"]))
    assert (found["data"], found["images"]) == ("folder", 6)  # a fifth of 30
    assert found["members"][0]["top1"] == pytest.approx(ran["test_top1"])
    same, other = photos / "val" / ".." / "train", photos / "val"
    for folder, images in ((same, 6), (other, 15)):  # never what it was trained on, unasked
        asked = ensemble.parse([f"{held}/model.pt", "--data-dir", str(folder)])
        assert ensemble.evaluate([f"{held}/model.pt"], asked)["images"] == images
    own = torch.load(f"{held}/model.pt", weights_only=True)
    torch.save({k: v for k, v in own.items() if k != "settings"}, f"{held}/silent.pt")
    code, line = failing(ensemble, [f"{held}/silent.pt"])
    assert code == 2 and "does not say which images" in line and "--data" in line


def test_scraps_are_those_of_training(tmp_path):
    argv = ["--teacher", "none", "--epochs", "1", "--warmup", "0", "--scraps", "0"]
    finetune.main(finetune.parse([*argv, "--out", str(tmp_path)]))
    checkpoint = checkpoints.read(tmp_path / "model.pt")
    assert checkpoint.images(ensemble.parse(["x"])).scraps == 0
    assert checkpoint.images(ensemble.parse(["x", "--scraps", "3"])).scraps == 3


def test_one_image_is_named_and_where_it_is_looked_at_is_drawn(
    small, photos, tmp_path, monkeypatch, capsys, failing
):
    monkeypatch.chdir(tmp_path)
    finetune.main(finetune.parse([*small, "--teacher", "none", "--out", "one"]))
    photo = photos / "val" / "red" / "1.jpg"
    capsys.readouterr()
    seen = ensemble.main(ensemble.parse(["one/model.pt", "--image", str(photo)]))["one/model.pt"]
    out = capsys.readouterr().out
    dataset = data.load(finetune.parse(small), CPU)
    number = [path for path, _ in image_folders.listing(photos / "val").samples].index(str(photo))
    batch = torch.cat([x for x, _ in dataset.test.in_order(5)])[number : number + 1]
    p = checkpoints.open_model("one/model.pt")(batch)[0].softmax(-1)
    expected = {name: 100 * p[i].item() for i, name in enumerate(dataset.classes)}
    assert seen == pytest.approx(expected, abs=1e-3) and sum(seen.values()) == pytest.approx(100)
    assert list(seen.values()) == sorted(seen.values(), reverse=True)
    assert all(f"%  {name}" in out for name in dataset.classes)
    assert Path("runs/1-looks.png").stat().st_size > 5000 and "runs/1-looks.png" in out
    code, line = failing(ensemble, ["one/model.pt", "--image", "one/log.jsonl"])
    assert code == 2 and "cannot read image" in line


def test_results_are_not_written_over_a_folder(tmp_path, failing):
    code, line = failing(ensemble, ["x.pt", "--json", tmp_path])
    assert code == 2 and "is a folder" in line and not list(tmp_path.parent.glob("*.part"))


def test_a_teacher_without_a_head_still_shows_where_it_looks(
    teacher, photos, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    photo = str(photos / "val" / "red" / "1.jpg")
    shutil.copy(teacher, "other.pt")
    seen = ensemble.main(ensemble.parse([teacher, "other.pt", "--image", photo]))
    assert seen == {teacher: {}, "other.pt": {}}
    assert {path.name for path in Path("runs").iterdir()} == {"1-looks-1.png", "1-looks-2.png"}


def test_a_device_is_not_written_over(tmp_path):
    with pytest.raises(Failed, match="a folder or a device"):
        storage.write_text(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()


def test_ruined_logits_are_no_accuracy(tmp_path, failing):
    argv = ["--teacher", "none", "--epochs", "1", "--warmup", "0", "--num-labels", "50"]
    code, line = failing(finetune, [*argv, "--lr", "1e18", "--out", tmp_path])
    assert code == 1 and "no longer finite" in line
    assert not (tmp_path / "model.pt").exists()


def imagenets(tmp_path, names: list[str], folders: list[str]):
    """A model of 1000 classes of these names; four images in each of the folders."""
    torch.manual_seed(0)
    net = vit.ViT(vit.Config(16, 4, 3, 1000, dim=16, depth=1, heads=2))
    path = tmp_path / "model.pt"
    torch.save(checkpoints.export(net) | {"classes": names}, path)
    root, random = tmp_path / "some-set", np.random.default_rng(0)
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for i in range(4):
            pixels = random.integers(0, 256, (20, 20, 3)).astype(np.uint8)
            name = f"ILSVRC2012_val_{4 * number + i + 1:08}.png"
            Image.fromarray(pixels).save(root / folder / name)
    return path, root


def test_folders_by_number_are_imagenets_classes_in_their_order(tmp_path):
    """ImageNet-V2's 0 to 999 are the sorted WordNet ids, wherever these are among the outputs."""
    wnids = [f"n{7 * i % 1000:08}" for i in range(1000)]  # not in order
    path, root = imagenets(tmp_path, wnids, ["0", "10", "999"])
    asked = ["--data", "folder", "--workers", "0"]
    by_number = ensemble.parse([str(path), *asked, "--data-dir", str(root)])
    for number in ("0", "10", "999"):
        (root / number).rename(root / f"n{int(number):08}")
    by_name = ensemble.evaluate([path], by_number)
    p, labels, _ = ensemble.probabilities(checkpoints.open_model(path), of(by_number, path), CPU)
    for number in ("0", "10", "999"):
        (root / f"n{int(number):08}").rename(root / number)
    again = ensemble.probabilities(checkpoints.open_model(path), of(by_number, path), CPU)
    assert torch.equal(p, again[0]) and torch.equal(labels, again[1])
    assert ensemble.evaluate([path], by_number) == by_name
    state = torch.load(path)
    del state["classes"]  # as files of others: ImageNet's in their order
    torch.save(state, path)
    model = checkpoints.open_model(path)
    assert ensemble.columns_of(["0", "10", "2"], model, by_number) == [0, 10, 2]


def of(settings, path):
    return checkpoints.read(path).images(settings)


def test_reals_labels_are_by_the_number_in_a_files_name(tmp_path):
    numbers = [3, 1, 8, 2]
    names = [f"n{i:08}/ILSVRC2012_val_{number:08}.JPEG" for i, number in enumerate(numbers)]
    source = data.Tensors(torch.zeros(4, 3, 2, 2), torch.zeros(4), names)
    images = data.Data([], 3, 2, None, test=data.Eval(source, None, CPU))
    p = torch.eye(1000)[[10, 20, 30, 40]]
    real = [[20, 5], [7], [10], [], [], [], [], []]  # right, wrong, right; the 8th has none
    (tmp_path / "real.json").write_text(json.dumps(real))
    found = ensemble.real_top1(p, images, str(tmp_path / "real.json"))
    assert found == pytest.approx(100 * 2 / 3)
    (tmp_path / "real.json").write_text("[[1], [2]]")
    for file in ("real.json", "missing.json"):
        with pytest.raises(ValueError, match="not the labels of these images"):
            ensemble.real_top1(p, images, str(tmp_path / file))
    with pytest.raises(ValueError, match="of 7 classes, not of 1000"):
        ensemble.real_top1(p[:, :7], images, "real.json")


def test_several_sets_in_one_table(tmp_path, capsys):
    path, root = imagenets(tmp_path, [f"n{i:08}" for i in range(1000)], ["n00000001", "n00000005"])
    (tmp_path / "another-set").mkdir()
    (tmp_path / "another-set" / "n00000005").symlink_to(root / "n00000005")
    argv = [path, "--data", "folder", "--workers", "0", "--data-dir", root]
    argv += ["--json", tmp_path / "out.json", "--sets", f"{root}/,{tmp_path / 'another-set'}"]
    ensemble.main(ensemble.parse([str(word) for word in argv]))
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["sets"][f"{root}/"]["ensemble_top1"] == found["ensemble_top1"]
    assert found["sets"][str(tmp_path / "another-set")] | {"sets": 0} == {
        **ensemble.evaluate([str(path)], ensemble.parse([str(path), "--data", "folder",
            "--data-dir", str(tmp_path / "another-set")])), "sets": 0,
    }  # fmt: skip
    lines = capsys.readouterr().out.split("top-1, %")[1].splitlines()
    assert lines[0].split() == ["folder", "some-set", "another-set"]
    assert lines[1].split() == ["images", "8", "8", "4"] and len(lines[1]) == 48
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):  # before anything is scored
        argv = ["none.pt", "--sets", f"{root},nowhere"]
        ensemble.main(ensemble.parse([str(word) for word in argv]))


def test_imagenets_archives_are_unpacked_once(tmp_path, monkeypatch, failing):
    imagenet = image_folders.imagenet
    pixels, wnids = io.BytesIO(), ["n01", "n02"]
    Image.new("RGB", (9, 9)).save(pixels, "jpeg")

    def tar(path, files: dict[str, bytes]):
        with tarfile.open(path, "w") as archive:
            for name, content in files.items():
                about = tarfile.TarInfo(name)
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))

    for wnid in wnids:
        tar(tmp_path / f"{wnid}.tar", {f"{wnid}_{i}.JPEG": pixels.getvalue() for i in range(2)})
    whole = {f"{wnid}.tar": (tmp_path / f"{wnid}.tar").read_bytes() for wnid in wnids}
    root = tmp_path / "imagenet"
    root.mkdir()
    tar(root / "ILSVRC2012_img_train.tar", whole)
    val = {f"ILSVRC2012_val_{i:08}.JPEG": pixels.getvalue() for i in (1, 2, 3)}
    tar(root / "ILSVRC2012_img_val.tar", val)
    code, line = failing(finetune, ["--data", "imagenet", "--data-dir", root, "--teacher", "none"])
    assert code == 2 and "cannot unpack" in line and not (root / "train").exists()

    md5s = {k: (name, None) for k, (name, _) in imagenet.ARCHIVE_META.items()}
    monkeypatch.setattr(imagenet, "ARCHIVE_META", md5s)
    meta = ({wnid: (wnid,) for wnid in wnids}, ["n02", "n01", "n02"])
    devkit = lambda root: torch.save(meta, Path(root) / imagenet.META_FILE)  # noqa: E731
    monkeypatch.setattr(imagenet, "parse_devkit_archive", devkit)
    image_folders.unpack(root)
    found = image_folders.find(root, True, "")
    assert found["train"].classes == found["test"].classes == wnids
    labels = [(Path(path).name[-6:-5], label) for path, label in found["test"].samples]
    assert labels == [("2", 0), ("1", 1), ("3", 1)]
    before = (root / "train").stat().st_mtime_ns
    image_folders.unpack(root)
    assert (root / "train").stat().st_mtime_ns == before and len(list(root.iterdir())) == 5
