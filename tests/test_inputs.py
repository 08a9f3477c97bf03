"""Wrong input of every kind: one line that says how to mend it, exit code 2, nothing spoiled."""

import launch

import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

import attention_copy
import attention_distill
import ensemble
import finetune
import pretrain
import storage
import teachers
import vit
from experiments import sinks, variants

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("argv, words", [
    (["--data", "mnist"], "choose one of digits, cifar10"),
    (["--data", "folder", "--data-dir", "nowhere"], "no folder nowhere"),
    (["--data", "cifar10", "--data-dir", "/dev/null/x"], "point --data-dir at folders"),
    (["--lr", "-1"], "--lr -1.0: must be at least 0"),
    (["--lr", "nan"], "--lr nan"),
    (["--lr", "inf"], "must be a finite number"),
    (["--epochs", "1" + 400 * "0"], "must be a finite number"),
    (["--lr", "fast"], "invalid float value: 'fast'"),
    (["--epochs", "0"], "--epochs 0: must be between 1 and"),
    (["--batch", "-1"], "--batch -1"),
    (["--batch", "400"], "more than the 100 training images"),
    (["--num-labels", "9999"], "only 997"),
    (["--holdout", "10"], "validation part of their own"),
    (["--warmup", "500"], "less than --epochs"),
    (["--drop-path", "1.5"], "between 0 and 0.99"),
    (["--model", "gigantic"], "choose one of nano"),
    (["--patch", "5"], "no multiple of the patch size 5"),
    (["--image-size", "30"], "12 pixels a side"),
    (["--amp", "fp8"], "choose one of auto, off, bf16"),
    (["--device", "tpu"], "--device tpu"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--out", "/dev/null/run"], "not a writable folder"),
    (["--no-such-flag", "1"], "unrecognized arguments"),
    (["--lay", "1"], "unrecognized arguments"),
])  # fmt: skip
def test_flags(argv, words, failing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, line = failing(finetune, ["--teacher", "none", *argv])
    assert code == 2 and words in line
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("script, argv, words", [
    (attention_distill, ["--layers", "99"], "4 layers (0 to 3)"),
    (attention_copy, ["--layers", "two"], "write a count"),
    (attention_copy, ["--teacher", "none"], "nothing to transfer"),
    (attention_copy, ["--components", "registers=-1"], "registers -1: must be at least 0"),
    (finetune, ["--teacher", "random"], "--teacher none"),
    (finetune, ["--compile", "graphs", "--micro-batch", "5"], "(5 of 50 images)"),
    (finetune, ["--model", "nano", "--out", "runs/pretrain-digits-nano-s0"], "the teacher lies"),
    (attention_copy, ["--teacher", "missing.pt"], "no checkpoint at missing.pt"),
    (attention_copy, ["--teacher", "mae"], "MAE published no 'micro' teacher"),
    (pretrain, ["--mask-ratio", "0.999"], "between 0.05 and 0.95"),
    (pretrain, ["--reconstruct", "x.png"], "no run at"),
    (pretrain, ["--decoder-dim", "10", "--decoder-heads", "2"], "divides by 4"),
    (pretrain, ["--decoder-heads", "7"], "no multiple of the number of heads"),
    (ensemble, ["missing.pt"], "no checkpoint at"),
    (ensemble, ["missing.pt", "--json", "/dev/null/x"], "--json: /dev/null is not a writable"),
    (sinks, ["missing.pt", "--out", "/dev/null/x"], "--out: /dev/null is not a writable"),
    (ensemble, ["missing.pt", "--json", "a/config.json"], "a run keeps its settings by this name"),
    (attention_copy, ["--layers", " 3"], "write a count"), (attention_copy, ["--layers", "+3"], ""),
    (pretrain, ["--components", "registers=1,registers=2"], "registers is named twice"),
    (pretrain, ["--components", "mlp=0.001"], "an MLP of no width"),
    (ensemble, ["missing.pt", "--json", "model.pt"], "--json model.pt: its name must end in .json"),
    (ensemble, [], "one or more model.pt"),
    (pretrain, ["--reconstruct", "x.txt"], "must end in .png or"),
    (variants, ["--how", "distill", "--lend", "v"], "--lend changes nothing of --how distill"),
    (variants, ["--detach"], "--detach changes nothing of --how copy"),
    (variants, ["--maps", "mean", "--lend", "v"], "--maps mean are made of no q, k and v"),
])  # fmt: skip
def test_methods(script, argv, words, failing, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if "--layers" in argv:
        argv = [*argv, "--teacher", "random"]
    code, line = failing(script, argv)
    assert code == 2 and words in line


@pytest.mark.parametrize("changes, words", [
    (dict(heads=2), "2 heads and the student 4"),
    (dict(patch=4), "10 tokens and the student 17"),
    (dict(channels=3), "3 channels and the student 1"),
    (dict(depth=2), "the teacher has 2 layers"),
])  # fmt: skip
def test_a_teacher_whose_maps_do_not_fit(changes, words, failing, tmp_path):
    shape = dict(image_size=12, patch=3, channels=1, classes=0, dim=32, depth=4, heads=4)
    net = vit.ViT(vit.Config(**shape | changes))
    torch.save(
        {"model": net.state_dict(), "architecture": asdict(net.config)}, tmp_path / "teacher.pt"
    )
    argv = ["--teacher", tmp_path / "teacher.pt", "--out", tmp_path / "run"]
    code, line = failing(attention_copy, argv)
    assert code == 2 and words in line
    code, line = failing(finetune, argv)  # which takes the weights, so the width must be right too
    assert code == 2 and "unlike --model micro --patch 3" in line
    assert not (tmp_path / "run").exists()


class Exploit:
    def __reduce__(self):
        return (Path("/tmp/attention-transfer-was-here").touch, ())


def test_files_that_are_no_checkpoints(failing, tmp_path, teacher):
    path, whole = tmp_path / "file.pt", Path(teacher).read_bytes()
    cases = {
        "cut short": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
        "code": pickle.dumps(Exploit()),
    }
    for content in cases.values():
        path.write_bytes(content)
        for script in (attention_copy, ensemble):
            argv = [path] if script is ensemble else ["--teacher", path]
            code, line = failing(script, argv)
            assert code == 2 and "no checkpoint that can be read safely" in line
    torch.save({"model": Exploit(), "cls_token": 1}, path)
    code, line = failing(attention_copy, ["--teacher", path])
    assert code == 2 and "no checkpoint that can be read safely" in line
    assert not Path("/tmp/attention-transfer-was-here").exists()
    for content in ({"weights": torch.ones(3)}, [1, 2], {"model": {"fc.weight": torch.ones(3)}}):
        torch.save(content, path)
        code, line = failing(attention_copy, ["--teacher", path])
        assert code == 2 and "holds no ViT" in line


def test_a_copy_student_is_no_teacher(failing, tmp_path):
    argv = ["--teacher", "random", "--epochs", "1", "--warmup", "0", "--out", str(tmp_path)]
    attention_copy.main(attention_copy.parse(argv))
    code, line = failing(attention_distill, ["--teacher", tmp_path / "model.pt"])
    assert code == 2 and "never learned where to look" in line


@pytest.fixture
def broken(photos, tmp_path):
    return shutil.copytree(photos, tmp_path / "broken")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("memory", ["2", "0"])  # held in memory, and streamed by workers
@pytest.mark.parametrize("spoil, words", [
    (truncate, "truncated"),
    (lambda path: path.write_text("not a picture"), "cannot identify image file"),
    (lambda path: path.write_bytes(b""), "cannot identify image file"),
])  # fmt: skip
def test_images_that_cannot_be_read(
    memory, spoil, words, failing, broken, small, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # where it is remembered which cannot be read
    bad = broken / "train" / "green" / "3.jpg"
    spoil(bad)
    argv = [
        *small,
        "--data-dir",
        broken,
        "--teacher",
        "none",
        "--memory",
        memory,
        "--workers",
        "1",
        "--out",
        tmp_path / "run",
    ]
    code, line = failing(finetune, argv)
    assert code == 2 and str(bad) in line and words in line and "--skip-unreadable" in line
    finetune.main(finetune.parse([*map(str, argv), "--skip-unreadable", "--overwrite"]))
    assert "1 unreadable image(s) left out" in capsys.readouterr().out


def test_folders(failing, broken, small):
    argv = [*small, "--data-dir", broken, "--teacher", "none"]
    for image in (broken / "train" / "red").iterdir():
        image.unlink()
    code, line = failing(finetune, argv)
    assert code == 2 and "red" in line and "no folder of classes with images" in line
    shutil.rmtree(broken / "train" / "red")
    code, line = failing(finetune, argv)
    assert code == 2 and "different classes: red" in line
    shutil.rmtree(broken / "train")
    code, line = failing(finetune, argv)
    assert code == 2 and "none to train on: point --data-dir" in line


def test_ensemble_refuses_what_cannot_be_averaged(failing, teacher, small, tmp_path, photos):
    code, line = failing(ensemble, [teacher, "--data", "folder", "--data-dir", photos])
    assert code == 2 and "has no head" in line
    finetune.main(finetune.parse([*small, "--teacher", "none", "--out", str(tmp_path / "photos")]))
    model = tmp_path / "photos" / "model.pt"
    code, line = failing(ensemble, [model, "--data", "digits"])  # it knows photographs in colour
    assert code == 2 and "12 pixels" in line
    strange = tmp_path / "strange" / "val" / "yellow"
    strange.mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(strange / "0.png")
    code, line = failing(ensemble, [model, "--data", "folder", "--data-dir", tmp_path / "strange"])
    assert code == 2 and "yellow" in line


def test_the_command_itself_ends_with_one_line_and_exit_code_2():
    command = [sys.executable, ROOT / "finetune.py", "--teacher", "none", "--lr", "-1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --lr -1.0: must be at least 0\n"
    shown = subprocess.run(
        [sys.executable, ROOT / "attention_distill.py", "--help"], capture_output=True, text=True
    )
    assert (
        shown.returncode == 0
        and "--attention-weight" in shown.stdout
        and "Traceback" not in shown.stderr
    )


def test_a_batch_that_does_not_divide_by_the_ranks(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        ROOT / "finetune.py",
        "--teacher",
        "none",
        "--batch",
        "25",
        "--out",
        tmp_path,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(said) == 1  # not one of each rank
    assert "--batch 25 does not divide by the 2 processes" in said[0]


# Before anything is made, trained or fetched ------------------------------------------------------


@pytest.mark.parametrize("script, argv, words", [
    (attention_distill, ["--layers", "99"], "4 layers (0 to 3)"),
    (attention_copy, ["--layers", "1000000000"], "4 layers (0 to 3)"),
    (attention_copy, ["--layers", "0-99999999999"], "4 layers (0 to 3)"),
    (attention_distill, ["--batch", "5000"], "more than the 100 training images"),
    (finetune, ["--batch", "5000"], "more than the 100 training images"),
    (attention_copy, ["--num-labels", "5000"], "only 997"),
    (finetune, ["--patch", "5"], "no multiple of the patch size 5"),
    (attention_distill, ["--patch", "7"], "no multiple of the patch size 7"),
    (attention_copy, ["--warmup", "450"], "less than --epochs"),
    (attention_distill, ["--out", "/dev/null"], "/dev/null is not a writable folder"),
    (attention_distill, ["--out", "/dev/null/x"], "/dev/null is not a writable folder"),
    (finetune, ["--device", "meta"], "is not available here"),
    (finetune, ["--resume", "--overwrite"], "choose one"),
    (finetune, ["--randaugment", "9"], "--randaugment: digits are augmented by"),
    (attention_copy, ["--data", "imagenet"], "train/CLASS/* and val/CLASS/*"),
    (attention_distill, ["--data", "imagenet", "--data-dir", "here"], "no folder here"),
    (attention_distill, ["--data", "folder"], "no folder data/folder"),
    (finetune, ["--data", "imagenet", "--model", "tiny"], "MAE published no 'tiny' teacher"),
    (finetune, ["--image-size", "1000000"], "between 0 and 4096"),
    (pretrain, ["--decoder-depth", "1000000"], "between 0 and 64"),
    (pretrain, ["--decoder-dim", "4000000000"], "between 4 and 8192"),
])  # fmt: skip
def test_what_is_wrong_is_found_before_a_teacher_is_made_or_fetched(
    script, argv, words, failing, tmp_path, monkeypatch
):
    def made(*_):
        raise AssertionError("a teacher was asked for")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teachers, "find", made)
    monkeypatch.setattr(storage, "read", made)
    code, line = failing(script, argv)
    assert code == 2 and words in line
    assert not list(tmp_path.rglob("*"))


def test_a_run_that_is_there_is_found_before_a_teacher_is_made(failing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script, name in ((finetune, "finetune"), (attention_copy, "copy"), (pretrain, "pretrain")):
        out = tmp_path / "runs" / f"{name}-digits-micro-s0"
        out.mkdir(parents=True)
        (out / "last.pt").write_text("something")
        code, line = failing(script, [])
        assert code == 2 and "already holds a run" in line


# The terminal -------------------------------------------------------------------------------------


def shell(command, **how):
    how = {"capture_output": True, "text": True, "timeout": 120} | how
    return subprocess.run(["bash", "-c", command.replace("python", sys.executable)], **how)


TRAINING = f"python {ROOT}/finetune.py --teacher none --epochs 4 --warmup 0 --eval-every 4"


def test_a_reader_that_leaves_and_a_closed_terminal(tmp_path):
    """`| head` ends the run quietly; without any stdout it goes on."""
    for words in (f"{TRAINING} --out {tmp_path}/run", f"python {ROOT}/finetune.py --help"):
        done = shell(f"set -o pipefail; {words} | head -1")
        assert len(done.stdout.splitlines()) == 1 and done.stderr == ""
    done = shell(f"{TRAINING} --out {tmp_path}/closed >&-")
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "closed/model.pt").exists()


def test_ctrl_c_while_modules_are_imported_is_one_line():
    for seconds in (0.3, 0.6, 0.9, 1.2):
        done = shell(f"timeout --signal=INT {seconds} {TRAINING}")
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 1


def test_a_full_disk_is_named_once(tmp_path, failing, monkeypatch):
    (tmp_path / f"e.json.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(launch.Failed, match=r"could not write .*e.json: No space left on device$"):
        storage.write_text(tmp_path / "e.json", "x" * 10**6)
    assert launch.describe(OSError(28, "No space left")) == ("No space left", 2)  # without a name


@pytest.mark.parametrize("message", [
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory",
    "MPS backend out of memory (MPS allocated: 17 GB)",
])  # fmt: skip
def test_a_full_memory_is_told_on_every_device(message):
    text, code = launch.describe(RuntimeError(message))
    assert code == 1 and "--micro-batch" in text
    assert launch.describe(torch.OutOfMemoryError("CUDA")) == (text, code)


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(RuntimeError, match="size"):
        launch.run(lambda settings: torch.ones(2) @ torch.ones(3), list)
