"""Wrong input of every kind: one line that says how to mend it, exit code 2, nothing spoiled."""

import json
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import attention_copy as copy
import attention_distill as distill
import ensemble
import finetune
import look
import pretrain
import vit
from common.checkpoints import read_file

ROOT = Path(__file__).parents[2]
DIGITS = f"--teacher {ROOT}/weights/digits.pt"


@pytest.mark.parametrize("script, argv, words", [
    (finetune, "--data folder --data-dir nowhere", "no folder nowhere"),
    (finetune, "--data imagenet", "train/CLASS/* and val/CLASS/*"), (look, "x.pt a.jpg", "first"),
    (finetune, "--data cifar10 --data-dir /dev/null/x", "/dev/null/x"),
    (finetune, "--lr -1", "--lr -1.0: must be at least 0"), (copy, "--layers 99", "some of 0 to 3"),
    (finetune, "--lr nan", "--lr nan"), (finetune, "--out /dev/null/run", "not a writable folder"),
    (finetune, "--lr inf", "--lr inf: must be"),
    (finetune, "--lay 1", "unrecognized"), (copy, "--teacher none", "finetune.py can do without"),
    (finetune, "--batch 400", "the 100 training images"), (finetune, "--device cuda:99", "cuda:99"),
    (finetune, "--num-labels 9999", "only 997 images"), (finetune, "--data-dir x", "dir: only "),
    (finetune, "--teacher none --model gigantic", "gigantic"), (copy, "--heads 4", "--heads 4"),
    (finetune, f"--model tiny {DIGITS}", "does not match --model"),
    (finetune, "--teacher none --patch 5", "try 10"),
    (finetune, "--data scenes --scene twins --classes 3,4", "three --classes"),
    (finetune, "--data scenes --scene twins --dial 0.5", "no --dial"),
    (finetune, "--data scenes --image-size 32", "24, 40 or 56"),
    (finetune, "--data scenes --image-size 72", "24, 40 or 56"),  # two pointers would look alike
    (finetune, "--scene twins", "--scene: only for --data scenes"),
    (finetune, "--resume --overwrite", "choose one"),
    (distill, "--teacher-layers :3 --layers :2", "--teacher-layers"),
    (pretrain, "--data digits --target cell", "--target: only for --data scenes"),
    (pretrain, "--mixup 0.5", "--mixup has no effect"), (look, "a.jpg missing.pt", "missing.pt"),
    (pretrain, "--data scenes --mask-ratio 0.5", "no effect with --target cell"),
    (pretrain, "--decoder-dim 42 --decoder-heads 2", "not 42"), (ensemble, "", "name one or more"),
])  # fmt: skip
def test_wrong_flags_and_values(script, argv, words, failing):
    data = ["--data", "digits"] if script not in (ensemble, look) and "--data" not in argv else []
    failing(script, [*data, *argv.split()], words)
    assert not list(Path().rglob("*.pt"))


@pytest.mark.parametrize("argv, changes, stored, words", [
    ("", dict(heads=2), {}, "'heads': 2"), ("", {}, dict(depth=5), "blocks.4.norm1.weight"),
    ("", dict(patch=4), {}, "--patch"), ("", {}, dict(positions="relative"), "relative"),
    ("", dict(channels=3), {}, "3 channels"), ("", {}, dict(dim=64), "size mismatch for cls_token"),
    ("", dict(depth=2), {}, "0 to 1"),
    ("--layers 0,1 --teacher-layers 3", {}, {}, "cannot take the maps"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit(argv, changes, stored, words, failing):
    shape = dict(image_size=12, patch=3, channels=1, classes=0, dim=32, depth=4, heads=4)
    config = vit.Config(**shape | changes)
    found = {"model": vit.ViT(config).state_dict(), "architecture": asdict(config) | stored}
    torch.save(found, "teacher.pt")
    usual = "--data digits --teacher teacher.pt --model micro --patch 3"
    failing(copy, [*usual.split(), *argv.split()], words)
    assert not Path("runs").exists()


class Exploit:
    def __reduce__(self):
        return (Path("attention-transfer-was-here").touch, ())


def save(contents):
    torch.save(contents, "file.pt")
    return Path("file.pt").read_bytes()


@pytest.mark.parametrize("spoil, words", [
    (lambda whole: whole[: len(whole) // 2], "cannot be read"),
    (lambda whole: whole[:-9000] + b"?" + whole[-8999:], "changed since it was written"),
    (lambda _: b"", "cannot be read"), (lambda _: save({"rope.": torch.ones(3)}), "has a rope"),
    (lambda _: b"\n<!DOCTYPE html><html>", "cannot be read"), (lambda _: save([1, 2]), "no model"),
    (lambda _: pickle.dumps(Exploit(), 2), "cannot be read"), (lambda _: b"hi", "cannot be read"),
    (lambda _: save({"model": Exploit()}), "cannot be read"),
    (lambda _: save({"model": {"fc.weight": torch.ones(3)}}), "no ViT we know"),
    (lambda _: save({"optimizer": {}, "run": {}}), "model.pt of a run"),
])  # fmt: skip
def test_files_that_are_no_checkpoints(spoil, words, failing):
    whole = (ROOT / "weights" / "digits.pt").read_bytes()
    Path("file.pt").write_bytes(spoil(whole))
    for script, argv in ((copy, ["--teacher", "file.pt"]), (ensemble, ["file.pt"])):
        failing(script, argv, "file.pt", words)
    assert Path("file.pt").exists() and not Path("attention-transfer-was-here").exists()


TENSORS = {
    "a.weight": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 2).half(),
    "empty": torch.empty(0, 4), "one": torch.tensor(3.5), "index": torch.arange(6).view(2, 3),
    "odd": torch.randn(3).bfloat16(), "double": torch.randn(4).double(),
}  # fmt: skip
FILE = Path("x.safetensors")


def test_it_reads_what_the_reference_wrote():
    save_file(TENSORS, FILE, metadata={"format": "pt"})
    torch.testing.assert_close(read_file(FILE), TENSORS, rtol=0, atol=0)  # dtypes as well


@pytest.mark.parametrize("key, changes, cut", [
    ("b", {}, 3), ("b", {"dtype": "F8"}, 0), ("b", {"shape": [9]}, 0), ("b", {"shape": [-7]}, 0),
])  # fmt: skip
def test_a_file_that_lies_is_refused(key, changes, cut):
    save_file(TENSORS, FILE)
    whole = FILE.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    header[key] |= changes
    text, raw = json.dumps(header).encode(), whole[end : len(whole) - cut]
    for content in (len(text).to_bytes(8, "little") + text + raw, b"", whole[:end]):
        FILE.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.safetensors cannot be read as a checkpoint"):
            read_file(FILE)
