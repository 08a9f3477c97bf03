"""The folder of a run, whose files USAGE.md lists: may it be used, may --resume continue it."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common import checkpoints
from common.launch import Failed, device_name, print0, rank
from common.settings import format_flag, get_values

FILES = ("last.pt", "model.pt", "test.pt", "log.jsonl", "config.json")


def get_folder(settings) -> Path:
    """--out, or a name that says what is trained. A teacher with a name replaces --model."""
    model, teacher = settings.model, Path(settings.teacher.partition("=")[0]).name
    teacher = re.sub(r"(\.(pt|pth|tar|bin|safetensors))+$", "", teacher)
    if teacher not in ("", "auto", "pretrain", "none", "random", "mae", "model"):
        model = teacher
    return Path(settings.out or f"runs/{settings.method}-{settings.data}-{model}-s{settings.seed}")


def describe_run(settings, dataset, teacher=None) -> dict[str, Any]:
    """The settings and inputs that must match for --resume."""
    pixels = {"mean": dataset.mean, "std": dataset.std} | (teacher.architecture if teacher else {})
    about = {
        "method": settings.method,
        "class_names": dataset.classes,
        "images": dataset.available,
        "images_fingerprint": dataset.fingerprint,
        "images_per_step": dataset.train.batch,  # with --batch 0 it depends on the folder
        "normalization": (list(pixels["mean"]), list(pixels["std"])),
        "teacher_weights": checkpoints.fingerprint(teacher.weights) if teacher else None,
        "teacher_family": teacher.method if teacher else None,
    }
    return about | {format_flag(k): v for k, v in get_values(settings, free=False).items()}


def load_state(out: Path, settings, run: dict) -> dict | None:
    """The state to resume from, or None to begin. ValueError if it is that of another run."""
    if not (settings.resume and (out / "last.pt").exists()):
        return None
    state = checkpoints.read_file(out / "last.pt")
    before = {"class_names": run["class_names"]} | state["run"]  # older runs do not say them
    odd = [k for k in before | run if (before.get(k) or None) != (run.get(k) or None)]  # unset
    if odd:
        words = (f"{k} was {str(before.get(k))[:40]}, now {str(run.get(k))[:40]}" for k in odd[:4])
        remedy = "choose another --out, or start over with --overwrite"
        raise ValueError(f"{out} holds another run ({'; '.join(words)}): {remedy}")
    return state


def check_folder(settings) -> None:
    """ValueError if --out cannot be written, or holds a run that was not asked for."""
    out = get_folder(settings)
    checkpoints.check_place(out / "config.json", f"--out {out}", ".json")
    if settings.data_dir and out.resolve().is_relative_to(Path(settings.data_dir).resolve()):
        raise ValueError(f"--out {out} lies among the images: choose an --out outside --data-dir")
    if settings.resume and settings.overwrite:
        raise ValueError("--resume continues, --overwrite starts over: choose one")
    teacher = Path(settings.teacher)
    if teacher.is_file() and teacher.resolve().parent == out.resolve():
        raise ValueError(f"--teacher {settings.teacher} lies in --out: choose another --out")
    there = {"last.pt", "model.pt"}.intersection(os.listdir(out) if out.is_dir() else ())
    if there and not (settings.overwrite or (settings.resume and "last.pt" in there)):
        remedy = "choose --resume (which needs its last.pt), --overwrite or another --out"
        raise ValueError(f"{out} already holds a run: {remedy}")


@contextlib.contextmanager
def lock(out: Path, wait: bool = False) -> Iterator[Path]:
    """A folder for this process alone. ValueError if another has it, unless it may `wait`."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a") as file:
        if rank() == 0:
            try:
                import fcntl

                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                words = f"another process is training in {out}"
                if not wait:
                    raise ValueError(f"{words}: wait for it") from error
                print0(f"{words}: waiting for it")
                fcntl.lockf(file, fcntl.LOCK_EX)
            except (ImportError, OSError):  # Windows, or a disk without locks
                pass
            for part in out.glob("*.[0-9]*.part"):  # of a process that was killed in saving
                part.unlink()
        yield out


def check_finite(values: dict[str, Any]) -> None:
    """Failed, before anything is saved, if one of these scalars is not finite."""
    for name, value in values.items():
        if not torch.isfinite(value):
            remedy = "try --amp off; to train, a lower learning rate or a longer --warmup"
            raise Failed(f"{name} is no longer finite: {remedy} (last.pt, if any, is still good)")


def begin(out: Path, run: dict, settings, learner, rows: list[dict]) -> None:
    """Says what runs here, and writes its log so far. A new run removes what was here."""
    if rank():
        return
    for name in () if learner.done else FILES:
        (out / name).unlink(missing_ok=True)
    about = get_values(settings) | {"torch": torch.__version__, "on": device_name(learner.device)}
    about |= {"precision": str(learner.precision), "threads": torch.get_num_threads()}
    if net := getattr(learner.net, "config", None):  # --model does not say it all
        about["architecture"] = asdict(net)
    about |= {"commit": read_commit(), "run": run}
    checkpoints.save(json.dumps(about, indent=1), out / "config.json")
    write_rows(out, rows)


def write_rows(out: Path, rows: list[dict], mode: str = "w") -> None:
    if rank() == 0:
        with open(out / "log.jsonl", mode) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def hash_settings(values: dict) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=4).hexdigest()


def read_commit() -> str:
    """The commit of this repository, marked if the code has changed since."""
    how: Any = dict(cwd=Path(__file__).parent.parent, text=True, stderr=subprocess.DEVNULL)
    try:
        changed = subprocess.check_output("git status --porcelain -- *.py *.npz".split(), **how)
        commit = subprocess.check_output("git rev-parse HEAD".split(), **how).strip()
        return commit + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return "unknown"
