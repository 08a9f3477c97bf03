"""Files of weights: ours, MAE's and timm's load; others are refused by name; any method opens."""

from pathlib import Path

import pytest
import timm
import torch

import attention_copy
import attention_distill
import checkpoints
import data
import ensemble
import finetune
import pretrain
import teachers
import train
import vit

CLASSES = [str(i) for i in range(10)]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return vit.build("tiny", image_size=32, patch=8, channels=3, classes=5)


def test_positions_interpolate_as_timms_do():
    pos = torch.randn(1, 1 + 49, 16)
    resample = timm.layers.resample_abs_pos_embed
    theirs = resample(pos, new_size=[14, 14], num_prefix_tokens=1, antialias=False)
    torch.testing.assert_close(checkpoints.interpolate(pos, 1 + 196), theirs)
    assert checkpoints.interpolate(pos, 50) is pos
    with pytest.raises(ValueError, match="no square grid"):
        checkpoints.interpolate(torch.randn(1, 12, 8), 17)


def test_mae_style_and_timm_files_load(net, tmp_path):
    mae = {k: v for k, v in net.state_dict().items() if not k.startswith(("head", "fc_norm"))}
    mae |= {"norm.weight": torch.ones(192), "norm.bias": torch.zeros(192)}
    mae["decoder_embed.weight"] = torch.ones(3, 3)
    torch.save({"model": mae}, tmp_path / "mae.pth")
    torch.save(net.state_dict(), tmp_path / "plain.pth")

    loaded = checkpoints.load(checkpoints.read(tmp_path / "mae.pth", heads=3), classes=9)
    assert loaded.head.out_features == 9
    for name, p in loaded.named_parameters():
        if not name.startswith(("head", "fc_norm")):
            assert torch.equal(p, net.state_dict()[name])
    images, plain = torch.randn(2, 3, 32, 32), checkpoints.read(tmp_path / "plain.pth", heads=3)
    assert torch.equal(checkpoints.load(plain)(images), net(images))
    larger = checkpoints.load(plain, image_size=64)
    assert larger.tokens == 65 and torch.isfinite(larger(torch.randn(1, 3, 64, 64))).all()


def test_a_teacher_with_another_pooling_can_teach(net, tmp_path):
    """timm's usual ViTs pool by class token: no fc_norm, but a norm and a head of their own."""
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=7, img_size=32, patch_size=8)
    torch.save(theirs.state_dict(), tmp_path / "deit.pth")
    argv = ["--data", "cifar10", "--model", "tiny", "--patch", "8", "--teacher-heads", "3"]
    asked = attention_copy.parse([*argv, "--teacher", str(tmp_path / "deit.pth")])
    images = data.Data(CLASSES, 3, 32, ([0.5] * 3, [0.5] * 3), None, None, None)
    teacher, student, layers, _ = teachers.teacher_and_student(asked, images)
    batch, seen = torch.randn(2, 3, 32, 32), []
    timm.layers.set_fused_attn(False)
    for i in layers:
        attention = theirs.blocks[i].attn
        attention.fused_attn = False
        attention.attn_drop.register_forward_hook(lambda *hook: seen.append(hook[-1]))
    theirs.eval()(batch)
    for lent, p in zip(teacher.queries_keys(batch, layers), seen, strict=True):
        torch.testing.assert_close(vit.attention_map(lent), p)
    assert student(batch, teacher.queries_keys(batch, layers)).shape == (2, 10)


def test_a_teacher_is_pre_trained_where_there_is_none(tmp_path, monkeypatch):
    """Once, with the recipe of pretrain.py, on all images of the kind that this run has."""
    trained = []

    def fit(task, settings):
        trained.append(settings)
        Path(settings.out or checkpoints.run_folder(settings, task.name)).mkdir(parents=True)
        exported = task.export(task.net) | {"normalization": task.data.normalization}
        checkpoints.save(exported, checkpoints.run_folder(settings, task.name) / "model.pt")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "fit", fit)
    argv = ["--scraps", "1", "--seed", "3", "--num-labels", "50", "--epochs", "7"]
    for script in (attention_distill, attention_copy, finetune):
        task = script.task(script.parse(argv))
    (asked,) = trained
    usual = pretrain.parse([])
    assert (asked.scraps, asked.seed, asked.num_labels, asked.resume) == (1, 3, 0, True)
    assert (asked.epochs, asked.lr, asked.mask_ratio) == (usual.epochs, usual.lr, usual.mask_ratio)
    made = checkpoints.read(tmp_path / "runs" / "pretrain-digits-micro-s3" / "model.pt")
    assert torch.equal(task.net.blocks[0].attn.qkv.weight, made.weights["blocks.0.attn.qkv.weight"])


def test_heads_are_never_guessed(net, tmp_path, failing):
    """With other heads the same weights are another function: MoCo v3's ViT-S has 12, not 6."""
    path, images = tmp_path / "plain.pth", torch.randn(2, 3, 32, 32)
    torch.save(net.state_dict(), path)
    with pytest.raises(ValueError, match="does not say how many attention heads"):
        checkpoints.read(path)
    six = checkpoints.load(checkpoints.read(path, heads=6))
    assert six.heads == 6 and not torch.allclose(six(images), net(images), atol=1e-3)
    torch.save(checkpoints.export(net), tmp_path / "ours.pt")  # ours say it, whatever is asked
    assert checkpoints.load(checkpoints.read(tmp_path / "ours.pt", heads=6)).heads == 3
    code, line = failing(ensemble, [path])
    assert code == 2 and "--heads" in line
    code, line = failing(attention_copy, ["--teacher", path])
    assert code == 2 and "--teacher-heads" in line
    asked = attention_copy.parse(["--teacher", str(path), "--teacher-heads", "6"])
    assert teachers.find(asked).architecture["heads"] == 6


def test_what_does_not_fit_is_refused_by_name(net, tmp_path):
    weights = net.state_dict()
    del weights["blocks.3.mlp.fc2.bias"]
    weights["blocks.0.ls1.gamma"] = torch.ones(192)
    weights["blocks.1.norm1.weight"] = torch.ones(7)
    torch.save(weights, tmp_path / "odd.pth")
    with pytest.raises(ValueError) as error:
        checkpoints.load(checkpoints.read(tmp_path / "odd.pth", heads=3))
    for words in (
        "blocks.3.mlp.fc2.bias is missing",
        "blocks.0.ls1.gamma is not ours",
        "blocks.1.norm1.weight is (7,), not (192,)",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize("odd", [
    {"layers": None}, {"layers": 5}, {"teacher": {"model": {"cls_token": 5}}},
    {"model": {"cls_token": 5}}, {"model": {1: torch.ones(3), "cls_token": 5}},
    {"architecture": {"image_size": 12, "classes": 10}},
])  # fmt: skip
def test_odd_contents_are_refused_in_one_line(odd, failing, tmp_path):
    shape = dict(image_size=12, patch=3, channels=1, classes=10, dim=32, depth=3, heads=4)
    found = attention_copy.export(vit.ViT(**shape), vit.ViT(**shape), [0, 2])
    torch.save(found | odd, tmp_path / "model.pt")
    code, line = failing(ensemble, [tmp_path / "model.pt"])
    assert code == 2 and "model.pt" in line


def test_a_model_opens_as_what_it_was_exported_from(tmp_path):
    """A plain ViT, and a student of copy with its teacher: the same logits, tokens and maps."""
    shape = dict(image_size=12, patch=3, channels=1, classes=10, dim=32, depth=3, heads=4)
    student, teacher = vit.ViT(**shape), vit.ViT(**shape | {"dim": 48, "classes": 0})
    images, layers = torch.randn(5, 1, 12, 12), [0, 2]
    torch.save(checkpoints.export(student) | {"classes": CLASSES}, tmp_path / "plain.pt")
    torch.save(attention_copy.export(student, teacher, layers), tmp_path / "copy.pt")
    plain, copy = (checkpoints.open_model(tmp_path / f"{name}.pt") for name in ("plain", "copy"))
    assert plain.checkpoint.classes == CLASSES
    torch.testing.assert_close(plain(images), student(images))
    expected = attention_copy.predict(student, images, teacher, layers)
    torch.testing.assert_close(copy(images), expected)
    assert not torch.allclose(expected, student(images))
    for i, ((x, attended), (_, theirs)) in enumerate(
        zip(copy.run(images), teacher.run(images), strict=True)
    ):
        assert torch.allclose(attended.q, theirs.q) if i in layers else attended.q.shape[-1] == 8
    torch.testing.assert_close(student.classify(x), expected)


def test_layers_are_written_as_count_range_or_list():
    assert teachers.parse_layers("3", 12) == [0, 1, 2]
    assert teachers.parse_layers("6-8", 12) == [6, 7, 8]
    assert teachers.parse_layers("0,2,4-5", 12) == [0, 2, 4, 5]
    assert teachers.parse_layers("all", 3) == [0, 1, 2]
    for wrong in ("99", "0", "3-99", "x", "", "5-3", "-6"):
        with pytest.raises(ValueError, match="--layers"):
            teachers.parse_layers(wrong, 12)
