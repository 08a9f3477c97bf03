"""Evaluation of checkpoints, alone and averaged."""

import shutil
from dataclasses import replace

import pytest
import torch

import attention_copy
import data
import ensemble
import finetune
import look
import recipes
import vit
from teachers.load import open_model


def train_on(small, out, *more):
    argv = [*small, "--teacher", "none", "--out", str(out), *map(str, more)]
    return finetune.main(finetune.parse(argv)), str(out / "model.pt")


def evaluate(*argv) -> dict:
    settings = ensemble.parse(list(map(str, argv)))
    return ensemble.evaluate(settings.checkpoints, settings)


def test_probabilities_are_averaged_over_the_classes_at_hand(small, photos, tmp_path, failing):
    paths = [train_on(small, tmp_path / seed, "--seed", seed)[1] for seed in ("0", "1")]
    for name in ("blue", "red"):  # two of the three classes
        shutil.copytree(photos / "val" / name, tmp_path / "subset" / name)
    argv = [*paths, "--data-dir", str(tmp_path / "subset"), "--holdout", "0"]
    settings = ensemble.parse(argv)
    result = ensemble.main(settings)
    how = replace(settings, data="folder", image_size=16)
    images, labels = next(data.load(how, train=False).test.in_order(100))
    p = [open_model(path)(images)[:, [0, 2]].softmax(-1) for path in paths]
    top1 = [100 * (x.argmax(-1) == labels).float().mean().item() for x in (*p, sum(p))]
    members = [member["top1"] for member in result["members"]]
    assert [*members, result["ensemble_top1"]] == pytest.approx(top1)
    assert (result["images"], result["classes"], result["part"]) == (10, 2, "test")
    shutil.rmtree(tmp_path / "subset" / "blue")  # any answer would be right
    failing(ensemble, argv, "one class")


def test_a_copy_student_is_evaluated_with_its_teacher(small):
    settings = attention_copy.parse([*small, *"--teacher random --layers 1:3 --out copy".split()])
    ran = attention_copy.main(settings)
    assert evaluate("copy/model.pt")["ensemble_top1"] == pytest.approx(ran["test_top1"], abs=1e-4)
    model, found = open_model("copy/model.pt"), torch.load("copy/test.pt", weights_only=True)
    images, labels = next(data.load(settings).test.in_order(15))
    logits = model(images)
    assert torch.equal(found["labels"], labels)
    assert torch.equal(found["predicted"], logits.argmax(-1))
    assert not torch.allclose(logits, model.net(images))  # by itself it sees otherwise


def test_the_images_are_those_that_a_checkpoint_was_trained_for(small, photos, tmp_path, failing):
    """Data set, folder and held-out part come from the file. What is asked for goes before it."""
    root = shutil.copytree(photos / "train", tmp_path / "unsplit")
    more = ["--num-labels", "0", "--data-dir", str(root)]
    ran, path = train_on(small, tmp_path / "run", *more)
    found = ensemble.main(ensemble.parse([path]))
    assert found["data"] == "folder" and 0 < found["images"] < 15
    assert found["part"] == f"--holdout {data.load(finetune.parse([*small, *more])).holdout}"
    assert found["members"][0]["top1"] == pytest.approx(ran["test_top1"])
    found.pop("members")
    for same in (shutil.copytree(root, tmp_path / "copied"), photos / "val" / ".." / "train"):
        again = evaluate(path, "--data-dir", same)
        assert again["members"][0]["trained_on"] == 0
        assert again.items() >= found.items()
    assert evaluate(path, "--data-dir", photos / "val", "--holdout", "0")["images"] == 15
    (root / "red").rename(root / "pink")
    failing(ensemble, [path], "pink")


def test_it_is_said_how_many_of_the_images_were_trained_on(small, photos, tmp_path, capsys):
    """As after a val/ that was there in training is removed."""
    root = shutil.copytree(photos, tmp_path / "photos")
    _, path = train_on(small, tmp_path / "run", "--data-dir", root)  # on 24 of the 30
    assert evaluate(path)["members"][0]["trained_on"] == 0
    shutil.rmtree(root / "val")
    found = ensemble.main(ensemble.parse([path]))
    assert (found["images"], found["members"][0]["trained_on"]) == (30, 24)
    assert "24 of these images were TRAINED ON" in capsys.readouterr().out
    assert evaluate(path, "--holdout", "0.5")["members"][0]["trained_on"] > 5
    shutil.move(root / "train", tmp_path / "moved")
    assert evaluate(path, "--data-dir", tmp_path / "moved")["members"][0]["trained_on"] == 24


def test_nets_of_different_images_are_not_averaged(failing):
    argv = "--teacher none --model nano --epochs 1 --num-labels 50 --batch 50".split()
    others = {"twins": "--scene twins", "digits": "--data digits --classes 5:"}
    for out, more in (others | {"pointer": "", "large": "--image-size 40"}).items():
        finetune.main(finetune.parse([*argv, *more.split(), "--out", out]))
    first, twins, digits, large = (f"{x}/model.pt" for x in ("pointer", "twins", "digits", "large"))
    failing(ensemble, [first, twins], f"{twins} is for --scene twins")
    failing(ensemble, [digits, first], "--data scenes, the first for digits")
    failing(ensemble, [first, large], "--image-size 40, the first for 24")
    assert len(evaluate(first, twins, "--scene", "twins")["members"]) == 2
    assert len(evaluate(first, large, "--image-size", 24)["members"]) == 2


def test_ruined_logits_are_no_accuracy(photos, tmp_path, failing):
    net = vit.ViT(vit.Config(16, 4, 3, 3, *recipes.SIZES["nano"]))
    net.head.weight.data.mul_(1e6)  # too large for float16 alone
    torch.save(net.state_dict(), tmp_path / "x.pth")
    argv = [f"nano={tmp_path / 'x.pth'}", "--data", "folder", "--data-dir", photos]
    assert evaluate(*argv, "--amp", "off")["images"] == 15
    failing(ensemble, [*argv, "--amp", "fp16"], "finite", code=1)
    net.head.bias.data.fill_(3e38)  # its sum over classes is not finite
    torch.save(net.state_dict(), tmp_path / "x.pth")
    failing(look, [photos / "val" / "red" / "1.jpg", argv[0]], "finite", code=1)
    argv = "--data digits --teacher none --epochs 1 --warmup 0 --num-labels 50 --lr 1e18".split()
    failing(finetune, [*argv, "--out", tmp_path], "no longer finite", code=1)
    assert not (tmp_path / "model.pt").exists()
