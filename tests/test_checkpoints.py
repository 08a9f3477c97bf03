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
import runs
import storage
import teachers
import train
import vit
from attention import attention_map
from augment import Normalise
from lending import parse_layers
from positions import resized

CLASSES = [str(i) for i in range(10)]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return vit.ViT(vit.Config(32, 8, 3, 5, *vit.SIZES["tiny"]))


def test_positions_interpolate_as_timms_do():
    pos = torch.randn(1, 1 + 49, 16)
    resample = timm.layers.resample_abs_pos_embed
    theirs = resample(pos, new_size=[14, 14], num_prefix_tokens=1, antialias=False)
    torch.testing.assert_close(resized(pos, 14), theirs)
    assert resized(pos, 7) is pos
    with pytest.raises(ValueError, match="no square grid"):
        resized(torch.randn(1, 12, 8), 4)


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
    assert larger.config.tokens == 65 and torch.isfinite(larger(torch.randn(1, 3, 64, 64))).all()


def test_a_teacher_with_another_pooling_can_teach(net, tmp_path):
    """timm's usual ViTs pool by class token: no fc_norm, but a norm and a head of their own."""
    theirs = timm.create_model("deit_tiny_patch16_224", num_classes=7, img_size=32, patch_size=8)
    torch.save(theirs.state_dict(), tmp_path / "deit.pth")
    argv = ["--data", "cifar10", "--model", "tiny", "--patch", "8", "--teacher-heads", "3"]
    asked = attention_copy.parse([*argv, "--teacher", str(tmp_path / "deit.pth")])
    images = data.Data(CLASSES, 3, 32, Normalise(([0.5] * 3, [0.5] * 3), "cpu"))
    teacher, student, layers, *_ = teachers.teacher_and_student(asked, images)
    batch, seen = torch.randn(2, 3, 32, 32), []
    timm.layers.set_fused_attn(False)
    for i in layers:
        attention = theirs.blocks[i].attn
        attention.fused_attn = False
        attention.attn_drop.register_forward_hook(lambda *hook: seen.append(hook[-1]))
    theirs.eval()(batch)
    for lent, p in zip(teacher.queries_keys(batch, layers), seen, strict=True):
        torch.testing.assert_close(attention_map(lent), p)
    assert student(batch, teacher.queries_keys(batch, layers)).shape == (2, 10)


@pytest.fixture
def pretrainings(tmp_path, monkeypatch):
    """The settings of each pre-training of a teacher, which leave untrained ones."""
    trained = []

    def fit(task, settings):
        trained.append(settings)
        out = runs.folder(settings, task.name)
        with runs.locked(out):
            run = runs.identity(task.name, task.data, None, settings)
            runs.describe(out, run, settings, "cpu")
            about = {"normalization": task.data.normalization, "settings": vars(settings)}
            storage.save(task.export(task.net) | about, out / "model.pt")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "fit", fit)
    return trained


def test_a_teacher_is_pre_trained_where_there_is_none(pretrainings):
    """Once, with the recipe of pretrain.py, on all images of the kind that this run has."""
    argv = ["--scraps", "2", "--seed", "3", "--num-labels", "50", "--epochs", "7"]
    for script in (attention_distill, attention_copy, finetune):
        task = script.task(script.parse(argv))
    (asked,) = pretrainings
    usual = pretrain.parse([])
    assert (asked.scraps, asked.seed, asked.num_labels) == (2, 3, 0)
    assert (asked.epochs, asked.lr, asked.mask_ratio) == (usual.epochs, usual.lr, usual.mask_ratio)
    made = checkpoints.read("runs/pretrain-digits-micro-s3/model.pt")
    assert torch.equal(task.net.blocks[0].attn.qkv.weight, made.weights["blocks.0.attn.qkv.weight"])
    assert task.teacher.fingerprint == made.fingerprint and str(usual.epochs) in str(made)


PRETRAIN = ["--teacher", "pretrain"]  # auto takes the one that comes with this repository


def test_a_teacher_that_was_made_otherwise_is_said_and_never_mixed(pretrainings, capsys):
    usual = "runs/pretrain-digits-micro-s0"
    pretrain_fit(["--epochs", "2", "--warmup", "0", "--out", usual])  # an earlier trial
    task = finetune.task(finetune.parse(PRETRAIN))
    assert "is made otherwise (epochs was 2, now 300" in capsys.readouterr().out
    assert task.teacher.settings["epochs"] == 300 and task.teacher.source != f"{usual}/model.pt"
    for argv in ([], ["--amp", "bf16"], ["--num-labels", "50"], ["--memory", "0"]):  # the same one
        assert (
            finetune.task(finetune.parse([*PRETRAIN, *argv])).teacher.source == task.teacher.source
        )
    assert len(pretrainings) == 2
    other = finetune.task(finetune.parse([*PRETRAIN, "--scraps", "2"])).teacher
    assert other.settings["scraps"] == 2 and other.source != task.teacher.source
    assert checkpoints.read(f"{usual}/model.pt").settings["epochs"] == 2  # left alone
    Path(usual, "config.json").unlink()
    assert finetune.task(finetune.parse(PRETRAIN)).teacher.source == task.teacher.source
    assert "of unknown origin" in capsys.readouterr().out and Path(usual, "model.pt").exists()


def test_components_are_those_of_the_teacher_that_is_made_for_them(pretrainings):
    task = attention_copy.task(attention_copy.parse(["--components", "registers=2"]))
    assert task.net.config.registers == 2 and pretrainings[0].components == "registers=2"
    other = ["--components", "registers=4", "--teacher", task.teacher.source]
    for script in (attention_copy, finetune):
        with pytest.raises(ValueError, match="this teacher has its own"):
            script.task(script.parse(other))


def test_a_teacher_of_some_images_is_not_taken_for_one_of_all(pretrainings, capsys):
    usual = "runs/pretrain-digits-micro-s0"
    pretrain_fit(["--num-labels", "500", "--out", usual])
    task = finetune.task(finetune.parse([*PRETRAIN, "--subset-seed", "3"]))
    assert "num_labels was 500, now 0" in capsys.readouterr().out
    assert task.teacher.source != f"{usual}/model.pt"
    assert finetune.task(finetune.parse(PRETRAIN)).teacher.source == task.teacher.source


def pretrain_fit(argv):
    asked = pretrain.parse(argv)
    train.fit(pretrain.task(asked), asked)


def test_an_unfinished_teacher_is_finished_first(pretrainings, capsys):
    out = Path("runs/pretrain-digits-micro-s0")
    finetune.task(finetune.parse(PRETRAIN))
    (out / "model.pt").unlink()
    finetune.task(finetune.parse(PRETRAIN))
    assert "is not finished: going on with it" in capsys.readouterr().out
    assert [asked.resume for asked in pretrainings] == [False, True]


def test_heads_are_never_guessed(net, tmp_path, failing):
    """With other heads the same weights are another function: MoCo v3's ViT-S has 12, not 6."""
    path, images = tmp_path / "plain.pth", torch.randn(2, 3, 32, 32)
    torch.save(net.state_dict(), path)
    with pytest.raises(ValueError, match="does not say how many attention heads"):
        checkpoints.read(path)
    six = checkpoints.load(checkpoints.read(path, heads=6))
    assert six.config.heads == 6 and not torch.allclose(six(images), net(images), atol=1e-3)
    torch.save(checkpoints.export(net), tmp_path / "ours.pt")  # ours say it, whatever is asked
    assert checkpoints.load(checkpoints.read(tmp_path / "ours.pt", heads=6)).config.heads == 3
    code, line = failing(ensemble, [path])
    assert code == 2 and "--num-heads" in line
    code, line = failing(attention_copy, ["--teacher", path])
    assert code == 2 and "--teacher-heads" in line
    asked = attention_copy.parse(["--teacher", str(path), "--teacher-heads", "6"])
    assert teachers.find(asked, None).architecture["heads"] == 6


def test_what_does_not_fit_is_refused_by_name(net, tmp_path):
    weights = net.state_dict()
    del weights["blocks.3.mlp.fc2.bias"]
    weights["blocks.0.attn.q_norm.weight"] = torch.ones(64)
    weights["blocks.1.norm1.weight"] = torch.ones(7)
    torch.save(weights, tmp_path / "odd.pth")
    with pytest.raises(ValueError) as error:
        checkpoints.load(checkpoints.read(tmp_path / "odd.pth", heads=3))
    for words in (
        "blocks.3.mlp.fc2.bias is missing",
        "blocks.0.attn.q_norm.weight is not ours",
        "blocks.1.norm1.weight is (7,), not (192,)",
    ):
        assert words in str(error.value)


SHAPE = dict(image_size=12, patch=3, channels=1, classes=10, dim=32, depth=3, heads=4)


@pytest.mark.parametrize("odd", [
    {"layers": None}, {"layers": 5}, {"layers": []}, {"layers": [7]}, {"layers": [-1]},
    {"teacher": {"model": {"cls_token": 5}}}, {"teacher": [1]},
    {"model": {"cls_token": 5}}, {"model": {1: torch.ones(3), "cls_token": 5}},
    {"architecture": {"image_size": 12, "classes": 10}}, {"architecture": SHAPE | {"dim": 1e9}},
    {"architecture": SHAPE | {"depth": -1}}, {"architecture": SHAPE | {"heads": "4"}},
    {"architecture": SHAPE | {"mlp": float("nan")}}, {"architecture": SHAPE | {"depth": 2.5}},
    {"classes": ["a"]}, {"classes": 10}, {"classes": [[i] for i in range(10)]},
    {"normalization": 5}, {"normalization": ([0.5], [0.0])}, {"normalization": ["a", "b"]},
    {"normalization": ([0.5] * 3, [0.5] * 3)}, {"method": 7}, {"settings": [1]},
    {"settings": {"data": "mnist"}}, {"settings": {"data": "digits", "scraps": 10**9}},
    {"settings": {"data": "digits", "holdout": "all"}}, {"settings": []}, {"settings": ""},
    {"settings": {"data": "digits", "scraps": True}}, {"classes": ["a"] * 10},
    {"settings": {"data": "digits", "amp": "fp8"}}, {"layers": [0.5, 1]},
    {"normalization": ([float("nan")], [1.0])}, {"normalization": ([0.5], [1e-45])},
])  # fmt: skip
def test_odd_contents_are_refused_in_one_line(odd, failing, tmp_path):
    found = checkpoints.export(vit.ViT(vit.Config(**SHAPE)), vit.ViT(vit.Config(**SHAPE)), [0, 2])
    torch.save(found | {"settings": {"data": "digits"}} | odd, tmp_path / "model.pt")
    code, line = failing(ensemble, [tmp_path / "model.pt"])
    assert code == 2 and "model.pt" in line


@pytest.mark.parametrize("odd, words", [
    (lambda w: w.to_sparse(), "ordinary numbers"), (lambda w: w.to("meta"), "ordinary numbers"),
    (lambda w: w.long(), "ordinary numbers"), (lambda w: w.to(torch.complex64), "ordinary numbers"),
    (lambda w: w * float("nan"), "is not finite: its training diverged"),
    (lambda w: "weights", "is no tensor"), (lambda w: w[:1, :1], "not (96, 32)"),
])  # fmt: skip
def test_odd_weights_are_refused_in_one_line(odd, words, failing, tmp_path):
    state = checkpoints.export(vit.ViT(vit.Config(**SHAPE))) | {"settings": {"data": "digits"}}
    name = "blocks.1.attn.qkv.weight"
    state["model"][name] = odd(state["model"][name])
    torch.save(state, tmp_path / "odd.pt")
    for script, argv in (
        (ensemble, []),
        (attention_copy, ["--teacher"]),
        (finetune, ["--teacher"]),
    ):
        code, line = failing(script, [*argv, tmp_path / "odd.pt"])
        assert code == 2 and name in line and words in line and "--lr" not in line


def test_a_teacher_of_a_copy_that_does_not_fit_is_refused(failing, tmp_path):
    odd = {"heads": {"heads": 2}, "tokens": {"patch": 4}, "channels": {"channels": 3}}
    for words, changes in odd.items():
        found = checkpoints.export(
            vit.ViT(vit.Config(**SHAPE)), vit.ViT(vit.Config(**SHAPE | changes)), [0, 2]
        )
        torch.save(found | {"settings": {"data": "digits"}}, tmp_path / "model.pt")
        code, line = failing(ensemble, [tmp_path / "model.pt"])
        assert code == 2 and f"{next(iter(changes)).rstrip('s')[:4]}" in line.replace(
            "tokens", "patc"
        )


def test_flipped_bytes_are_found(failing, tmp_path):
    """In every tenth of the file, in a model and in the state of a run."""
    argv = ["--teacher", "none", "--epochs", "1", "--warmup", "0", "--out", str(tmp_path)]
    finetune.main(finetune.parse(argv))
    for name, script, asked in (
        ("model.pt", ensemble, [tmp_path / "model.pt"]),
        ("last.pt", finetune, [*argv, "--resume"]),
    ):
        whole = (tmp_path / name).read_bytes()
        for tenth in range(10):
            flipped = bytearray(whole)
            at = len(whole) * (2 * tenth + 1) // 20
            for i in range(at, at + 64):  # wider than what only fills up a line
                flipped[i] ^= 0x10
            (tmp_path / name).write_bytes(flipped)
            code, line = failing(script, asked)
            assert code == 2 and ("damaged" in line)
        (tmp_path / name).write_bytes(whole)


def test_the_state_of_a_run_is_no_model(failing, tmp_path):
    argv = ["--teacher", "none", "--epochs", "1", "--warmup", "0", "--out", str(tmp_path)]
    finetune.main(finetune.parse(argv))
    code, line = failing(ensemble, [tmp_path / "last.pt"])
    assert code == 2 and "name its model.pt" in line


def test_the_fingerprint_is_of_the_weights_not_of_the_file(net, tmp_path):
    torch.save(checkpoints.export(net), tmp_path / "ours.pt")
    torch.save(net.state_dict(), tmp_path / "plain.pth")
    found = [checkpoints.read(tmp_path / name, heads=3) for name in ("ours.pt", "plain.pth")]
    assert found[0].fingerprint == found[1].fingerprint
    with torch.no_grad():
        net.blocks[3].mlp.fc1.bias[0] += 1e-3
    torch.save(net.state_dict(), tmp_path / "plain.pth")
    assert checkpoints.read(tmp_path / "plain.pth", heads=3).fingerprint != found[0].fingerprint


def test_a_model_opens_as_what_it_was_exported_from(tmp_path):
    """A plain ViT, and a student of copy with its teacher: the same logits, tokens and maps."""
    shape = dict(image_size=12, patch=3, channels=1, classes=10, dim=32, depth=3, heads=4)
    student, teacher = (
        vit.ViT(vit.Config(**shape)),
        vit.ViT(vit.Config(**shape | {"dim": 48, "classes": 0})),
    )
    images, layers = torch.randn(5, 1, 12, 12), [0, 2]
    torch.save(checkpoints.export(student) | {"classes": CLASSES}, tmp_path / "plain.pt")
    torch.save(checkpoints.export(student, teacher, layers), tmp_path / "copy.pt")
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
    assert parse_layers("3", 12) == [0, 1, 2]
    assert parse_layers("6-8", 12) == [6, 7, 8]
    assert parse_layers("0,2,4-5", 12) == [0, 2, 4, 5]
    assert parse_layers("all", 3) == [0, 1, 2]
    assert parse_layers("75%", 24) == list(range(18)) and parse_layers("75%", 6) == [0, 1, 2, 3]
    for wrong in ("99", "0", "3-99", "x", "", "5-3", "-6"):
        with pytest.raises(ValueError, match="--layers"):
            parse_layers(wrong, 12)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_program_is_not_run(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="a TorchScript program, which is not run"):
        checkpoints.read(tmp_path / "clip.pt")
