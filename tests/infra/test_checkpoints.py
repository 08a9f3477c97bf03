"""Files of weights are read, downloaded or refused. Teachers are found, or made once."""

import hashlib
import json
import subprocess
import sys
import threading
from argparse import Namespace
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm.models import VisionTransformer
from torch import nn

import attention_copy
import attention_distill
import data
import finetune
import pretrain
import recipes
import vit
from common import checkpoints
from recipes import NORMALIZATIONS
from teachers import bundled
from teachers.classes import IMAGENET, NUMBERS, match_classes
from teachers.find import find_teacher, make_teacher
from teachers.load import build_vit, open_model, read_checkpoint

WEIGHTS = Path(__file__).parents[2] / "weights"


@pytest.mark.parametrize("name", ["digits", "cifar10", "scenes"])
def test_bundled_files_are_what_is_said_of_them_and_plain_vits(name):
    facts, file = json.loads((WEIGHTS / f"{name}.json").read_text()), WEIGHTS / f"{name}.pt"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == facts["sha256"]
    found = read_checkpoint(file)
    net, state = build_vit(found), torch.load(file, weights_only=True)["model"]
    assert type(net) is vit.ViT
    kind = recipes.DATA_SETS[name]  # older files say it beside the architecture
    assert (net.config.mean, net.config.std) == (kind.mean, kind.std)
    for key, value in net.state_dict().items():  # the last norm is the file's, too
        assert torch.equal(value, state[key if key in state else key.replace("fc_norm", "norm")])
    settings = pretrain.parse(["--data", name])
    settings = replace(settings, **{key: facts["for"][key] for key in ("model", "patch")})
    assert bundled.find_bundled(settings) == file
    assert bundled.find_bundled(replace(settings, patch=2)) is None


@pytest.fixture
def pretrainings(monkeypatch):
    """The settings of each pre-training of a teacher, which leave untrained ones."""
    made = []

    def main(settings):
        made.append(settings)
        task = pretrain.task(settings, data.load(settings))
        found = task.export(task.net) | {"method": "pretrain"}
        checkpoints.save(found, Path(settings.out) / "model.pt")

    monkeypatch.setattr(pretrain, "main", main)
    return made


def find_for(script, *argv: str) -> checkpoints.Checkpoint | None:
    settings = script.parse(["--data", "digits", *argv, "--device", "cpu"])
    return find_teacher(settings, data.load(settings))


def test_a_teacher_is_pre_trained_where_there_is_none(pretrainings, capsys):
    """Once, with the recipe of pretrain.py, on all images of the kind that this run has."""
    argv = ["--distractors", "2", "--seed", "3", "--num-labels", "50", "--epochs", "7"]
    found = [find_for(script, *argv) for script in (attention_distill, attention_copy, finetune)]
    (asked,), usual = pretrainings, pretrain.parse(["--data", "digits"])
    assert (asked.distractors, asked.seed, asked.num_labels) == (2, 3, usual.num_labels)
    assert (asked.epochs, asked.blr, asked.mask_ratio) == (usual.epochs, usual.blr, 0.6)
    assert len({checkpoints.fingerprint(one.weights) for one in found}) == 1
    assert found[0].method == "pretrain"
    assert capsys.readouterr().out.count("making one first") == 1
    for other in (["--seed", "4"], ["--patch", "4"], ["--model", "mini"]):
        assert find_for(attention_copy, *argv, *other).source != found[0].source
    assert find_for(finetune, *argv, "--amp", "off").source == found[0].source


def test_a_teacher_is_made_by_the_recipe_that_was_asked_for(pretrainings, photos):
    argv = ["--data", "cifar10", "--recipe", "gpu"]
    find_for(attention_copy, *argv, "--data-dir", str(photos), "--batch", "8")
    assert pretrainings[0].epochs == pretrain.parse(argv).epochs > pretrain.parse(argv[:2]).epochs


@pytest.mark.slow
def test_a_teacher_is_finished_or_waited_for_and_a_run_is_not_written_over(pretrainings):
    settings = attention_copy.parse(["--data", "digits", "--out", "mine", "--device", "cpu"])
    images, own = data.load(settings), dict(model="nano", num_labels=0)
    path = make_teacher(pretrain, settings, images, **own).absolute()
    path.unlink()
    Path("mine").mkdir()
    Path("mine/model.pt").touch()
    with pytest.raises(ValueError, match="already holds a run"):
        make_teacher(pretrain, settings, images, **own)
    settings = replace(settings, out="")
    assert make_teacher(pretrain, settings, images, **own).samefile(path)
    assert len(pretrainings) == 2 and all(asked.resume for asked in pretrainings)
    path.unlink()
    make_teacher(pretrain, replace(settings, overwrite=True), images, **own)
    assert pretrainings[-1].overwrite and not pretrainings[-1].resume
    path.unlink()  # and now another process makes it
    code = f"""import time; from common import runs; from pathlib import Path
with runs.lock(Path({str(path.parent)!r})):
    print("locked", flush=True); time.sleep(1); Path({str(path)!r}).touch()"""
    how = dict(stdout=subprocess.PIPE, cwd=WEIGHTS.parent)
    with subprocess.Popen([sys.executable, "-c", code], **how) as other:
        assert other.stdout.readline() == b"locked\n"
        assert make_teacher(pretrain, settings, images, **own).samefile(path)
    assert len(pretrainings) == 3


def test_a_student_of_attention_copy_is_no_teacher():
    student = vit.ViT(vit.Config(12, 3, 1, 10, *recipes.SIZES["nano"]))
    torch.save(checkpoints.export(student, student, [0, 1]), "copy.pt")
    with pytest.raises(ValueError, match="name the teacher it had"):
        find_for(finetune, "--teacher", "copy.pt")


def test_a_teacher_that_began_as_its_student_is_said(capsys):
    """Of public ViTs, of pre-trained and of fine-tuned ones nobody says it."""
    net, words = vit.ViT(vit.Config(12, 3, 1, 10, *recipes.SIZES["micro"])), "first weights"
    for method, seed, said in (("scratch", 3, True), ("distill", 3, True), ("scratch", 4, False),
                               ("pretrain", 3, False), ("finetune", 3, False)):  # fmt: skip
        found = {"method": method, "settings": {"seed": seed}}
        checkpoints.save(checkpoints.export(net) | found, Path("x.pt"))
        find_for(attention_copy, "--teacher", "x.pt", "--seed", "3")
        assert (words in capsys.readouterr().out) == said, method


def test_a_teacher_that_saw_test_images_or_sees_little_is_said(small, photos, tmp_path, capsys):
    def train_on(place, name):
        argv = [*small, "--data-dir", str(place), "--out", str(tmp_path / name), "--epochs", "1"]
        pretrain.main(pretrain.parse([*argv, "--num-labels", "0", "--holdout", "0"]))
        teacher = tmp_path / name / "model.pt"
        capsys.readouterr()
        finetune.main(finetune.parse([*small, "--teacher", str(teacher), "--overwrite"]))
        return " ".join(capsys.readouterr().out.split())

    assert "TRAINED ON" not in train_on(photos, "apart")
    said = train_on(photos / "val", "same")
    assert "trained on 15 of the test images" in said and said.endswith("15 TRAINED ON)")
    net = vit.ViT(vit.Config(64, 4, 1, 10, *recipes.SIZES["nano"]))
    torch.save(checkpoints.export(net), "16x16.pt")
    find_for(attention_copy, "--teacher", "16x16.pt")  # which sees 3 x 3 patches here
    assert "sees little" not in said and "sees little at 12 p" in capsys.readouterr().out


def test_heads_are_never_guessed(tmp_path):
    """With other heads the same weights are another function: MoCo v3's ViT-S has 12, not 6."""
    small = vit.ViT(vit.Config(32, 8, 3, 5, *recipes.SIZES["small"])).eval()
    path, images = tmp_path / "plain.pth", torch.randn(2, 3, 32, 32)
    torch.save(small.state_dict(), path)
    for source in (path, f"tiny={path}"):
        with pytest.raises(ValueError, match="small=FILE"):
            read_checkpoint(source)
    six, twelve = (build_vit(read_checkpoint(f"{n}={path}", "none")) for n in ("small", "small/12"))
    assert torch.equal(six(images), small(images)) and twelve.config.heads == 12
    torch.save(checkpoints.export(small), tmp_path / "ours.pt")  # ours say it, whatever is asked
    assert read_checkpoint(f"small/12={tmp_path / 'ours.pt'}").architecture["heads"] == 6


@pytest.mark.parametrize("prefix, how", [
    ("", {}), ("model.", dict(global_pool="avg")), ("_orig_mod.", dict(class_token=False)),
    ("module._orig_mod.", {}), ("encoder.module.model.", dict(global_pool="avg")),
])  # fmt: skip
def test_a_head_reads_what_it_reads_in_timm(prefix, how, tmp_path):
    """Class token, mean, or mean of norms; under all names that frameworks put before."""
    more = dict(global_pool="avg", fc_norm=False) if "class_token" in how else {}
    shape = dict(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=7)
    theirs = VisionTransformer(**shape, **how, **more).eval()
    for i, parameter in enumerate(theirs.parameters()):
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    state = {prefix + name: value for name, value in theirs.state_dict().items()}
    torch.save({"state_dict": state, "args": Namespace(lr=1)}, tmp_path / "x.pth")
    found, images = read_checkpoint(f"micro={tmp_path}/x.pth", "none"), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(open_model(found)(images), theirs(images))
    new = build_vit(found, classes=3)  # reads the mean, whatever the old one read
    tokens = new.forward_features(images)[:, new.config.num_prefix_tokens :]
    torch.testing.assert_close(new(images), new.head(new.fc_norm(tokens.mean(dim=1))))


def test_what_a_file_holds_instead_is_said(tmp_path, capsys):
    state = VisionTransformer(img_size=32, embed_dim=64, depth=4, num_heads=4).state_dict()
    path, average = tmp_path / "x.pth", {name: 2 * value for name, value in state.items()}
    torch.save({"model": state, "model_ema": average, "optimizer": {"state": {}}}, path)
    weights = read_checkpoint(f"micro={path}").weights
    assert torch.equal(weights["cls_token"], state["cls_token"])
    assert "model and model_ema: model is taken" in capsys.readouterr().out
    for contents, words in (
        ({"vit.embeddings.cls_token": torch.ones(1)}, "embeddings.cls_token"),
        ({"model": state, "run": Path("/")}, "save its weights alone"),
        (state | {"head.bias": torch.full((1000,), float("nan"))}, "head.bias"),
        (state | {"head.bias": torch.ones(1000, dtype=torch.int8)}, "head.bias"),
    ):
        torch.save(contents, path)
        with pytest.raises(ValueError, match=words):
            read_checkpoint(f"micro={path}")


def test_a_download_is_checked_kept_and_leaves_nothing_else_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for name in ("x-0123456789.pth", "y.pth"):
        Path(name).write_bytes(b"abcd")
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        for wrong in ("missing.pth", "x-0123456789.pth"):
            with pytest.raises(ValueError, match="cannot download"):
                checkpoints.download(url + wrong)
        assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]
        assert checkpoints.download(f"{url}y.pth").read_bytes() == b"abcd"
        server.shutdown()
    assert checkpoints.download(f"{url}y.pth").is_file()  # without the server


@pytest.mark.parametrize("name", ["", "half"])
def test_pixels_that_a_file_does_not_name_are_said_wherever_it_is_opened(name, tmp_path, capsys):
    net = vit.ViT(vit.Config(32, 8, 3, 5, *recipes.SIZES["tiny"])).eval()
    images = torch.rand(2, 3, 32, 32)
    torch.save(net.state_dict(), tmp_path / "plain.pth")
    opened = open_model(f"tiny={tmp_path / 'plain.pth'}", normalization=name)
    mean, std = (torch.tensor(x)[:, None, None] for x in NORMALIZATIONS[name or "imagenet"])
    torch.testing.assert_close(opened(images), net((images - mean) / std))
    assert ("names no mean" in capsys.readouterr().out) == (not name)


def test_folders_are_matched_with_outputs_by_name_id_number_or_order(capsys):
    def match(known, outputs, folders):
        found = checkpoints.Checkpoint("x.pth", {}, {}, known)
        net = SimpleNamespace(config=SimpleNamespace(classes=outputs))
        return match_classes(SimpleNamespace(checkpoint=found, net=net), folders)

    ids, order = [f"n{i:08}" for i in range(1000)], list(range(1000))
    for known, outputs, folders, expected in (
        (["b", "a", "c"], 3, ["a", "c"], [1, 2]), (IMAGENET, 1000, ["tench", "goldfish"], [0, 1]),
        (IMAGENET, 1000, ids, order), (None, 1000, ids, order),
        (ids[::-1], 1000, NUMBERS, order[::-1]), (None, 3, ["01", "02", "10"], [0, 1, 2]),
        (None, 1000, sorted(NUMBERS), list(map(int, sorted(NUMBERS)))),
    ):  # fmt: skip
        assert match(known, outputs, folders) == expected
    assert "01 to 10" in capsys.readouterr().out
    for known, outputs, folders in (
        (None, 3, ["1", "10", "2"]), (None, 4, ["a", "b", "c"]), (["a", "b"], 2, ["a", "c"]),
        (IMAGENET, 1000, ids[:10]), (IMAGENET, 1000, ["0", "1"]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="classes"):
            match(known, outputs, folders)
