"""The folder of a run: what it holds, and whether --resume may continue it.

config.json   the run's settings and inputs
log.jsonl     one row per epoch: [json.loads(line) for line in open("log.jsonl")]
curves.png    the same as a picture
last.pt       the state to resume from
model.pt      the weights to share
test.pt       predicted and true classes of the test images, in order
"""

import contextlib
import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common import checkpoints
from common.launch import rank
from common.settings import free_in, values_of

FILES = ("last.pt", "model.pt", "test.pt", "log.jsonl", "curves.png", "config.json")


def get_folder(settings) -> Path:
    model = settings.model.replace(":", "-")
    name = f"{settings.method}-{settings.data}-{model}-s{settings.seed}"
    return Path(settings.out or f"runs/{name}")


def describe_run(settings, dataset, teacher=None) -> dict[str, Any]:
    """The settings and inputs that must match for --resume."""
    found = {
        "method": settings.method,
        "classes": dataset.classes,
        "images": dataset.available,
        "images_fingerprint": dataset.fingerprint,
        "images_per_step": dataset.train.batch,  # with --batch 0 it depends on the folder
        "normalization": dataset.normalization,
        "teacher_weights": teacher.fingerprint if teacher else None,
        "teacher_family": teacher.method if teacher else None,
    }
    free = free_in(settings)
    return found | {k: v for k, v in values_of(settings).items() if k not in free}


def list_differences(before: dict, now: dict) -> list[str]:
    """A setting that is newer than the run counts as unset in it."""
    odd = [k for k in before | now if (before.get(k) or None) != (now.get(k) or None)]
    return [f"{k} was {str(before.get(k))[:40]}, now {str(now.get(k))[:40]}" for k in odd]


def read_config(out: Path) -> dict | None:
    """What the run in a folder is, finished or not. None if there is none."""
    try:
        return dict(json.loads((out / "config.json").read_text())["run"])
    except (OSError, ValueError, LookupError, TypeError):
        return {} if any((out / name).exists() for name in FILES) else None


def check_folder(settings) -> None:
    """ValueError if --out cannot be written, or holds a run that was not asked for."""
    out = get_folder(settings)
    checkpoints.check_place(out / "config.json", f"--out {out}", ".json")
    if settings.data_dir and out.resolve().is_relative_to(Path(settings.data_dir).resolve()):
        raise ValueError(f"--out {out} lies among the images: choose an --out outside --data-dir")
    if settings.resume and settings.overwrite:
        raise ValueError("--resume continues, --overwrite starts over: choose one")
    if Path(settings.teacher).resolve().parent == out.resolve():
        raise ValueError(f"--teacher {settings.teacher} lies in --out: choose another --out")
    if read_config(out) is not None and not (settings.resume or settings.overwrite):
        raise ValueError(
            f"{out} already holds a run: continue with --resume, start over with --overwrite, or "
            "choose another --out"
        )


@contextlib.contextmanager
def lock(out: Path, wait: bool = False) -> Iterator[Path]:
    """The folder for this process alone, until the process ends. ValueError if another has it.

    `wait`: until that one is done.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a") as file:
        try:
            import fcntl

            if rank() == 0:
                fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"another process is training in {out}: wait for it, or choose another --out"
            ) from None
        except (ImportError, OSError):  # Windows, or a disk without locks
            pass
        yield out


def load_state(out: Path, settings, run: dict) -> dict | None:
    """The state to resume from, or None to begin. ValueError if it is that of another run."""
    if not (settings.resume and (out / "last.pt").exists()):
        return None
    state = checkpoints.read_file(out / "last.pt")
    if odd := list_differences(dict(state["run"]), run):
        raise ValueError(
            f"{out} holds another run ({'; '.join(odd[:4])}): choose another --out, or start over "
            "with --overwrite"
        )
    return state


def clear(out: Path) -> None:
    """Removes what an earlier run left."""
    if rank() == 0:
        for name in FILES:
            (out / name).unlink(missing_ok=True)


def write_config(out: Path, run: dict, settings, device) -> None:
    about = {"torch": torch.__version__, "on": str(device), "commit": read_commit(), "run": run}
    if rank() == 0:
        text = json.dumps(values_of(settings) | about, indent=1)
        checkpoints.write_text(out / "config.json", text)


def write_rows(out: Path, rows: list[dict]) -> None:
    if rank() == 0:
        checkpoints.write_text(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def hash_settings(values: dict) -> str:
    """8 hex digits for a folder's name."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def read_commit() -> str:
    """The commit of this repository, marked if the code has changed since."""

    def git(*words: str) -> str:
        how: dict[str, Any] = dict(capture_output=True, text=True, cwd=Path(__file__).parent)
        return subprocess.run(["git", *words], **how).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", "..")
    except OSError:  # no git here
        return "unknown"
    code = any(line.endswith((".py", ".npz")) for line in changed.splitlines())
    return (head or "unknown") + (" with changes" if code else "")
