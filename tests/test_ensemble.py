"""Evaluation of checkpoints, alone and averaged."""

from pathlib import Path

import pytest
import torch

import attention_copy
import checkpoints
import data
import ensemble
import finetune

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
