"""Evaluation of checkpoints, alone and averaged."""

from launch import Failed

import shutil
from pathlib import Path

import pytest
import torch

import attention_copy
import checkpoints
import data
import ensemble
import finetune
import image_folders
import storage

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
    images = next(
        data.load(settings.but(image_size=16, holdout=0), CPU, train=False).test.in_order(100)
    )
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
    images = data.load(finetune.parse(small), CPU)
    number = [path for path, _ in image_folders.listing(photos / "val").samples].index(str(photo))
    batch = torch.cat([x for x, _ in images.test.in_order(5)])[number : number + 1]
    p = checkpoints.open_model("one/model.pt")(batch)[0].softmax(-1)
    expected = {name: 100 * p[i].item() for i, name in enumerate(images.classes)}
    assert seen == pytest.approx(expected, abs=1e-3) and sum(seen.values()) == pytest.approx(100)
    assert list(seen.values()) == sorted(seen.values(), reverse=True)
    assert all(f"%  {name}" in out for name in images.classes)
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
