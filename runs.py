"""The folder of a run: what the run is, what it leaves there, whether --resume may continue it.

config.json   what the run is, and how it was asked for
log.jsonl     a row per epoch: [json.loads(line) for line in open("log.jsonl")]
curves.png    the same as a picture
last.pt       the state to resume from
model.pt      the weights to share (checkpoints.open_model)
test.pt       predicted and true classes of the test images, in order
"""

from launch import print0, rank

import contextlib
import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

import families
import storage
from checkpoints import Checkpoint
from data import KINDS, Data, Tensors
from settings import FREE, Settings

LEFT_BEHIND = ("last.pt", "model.pt", "test.pt", "log.jsonl", "curves.png", "config.json")


def folder(settings: Settings, name: str) -> Path:
    model = settings.model.replace(":", "-")
    return Path(settings.out or f"runs/{name}-{settings.data}-{model}-s{settings.seed}")


def identity(name: str, dataset: Data, teacher: Checkpoint | None, settings: Settings) -> dict:
    """What a run is: with anything of it changed it would be another run."""
    about = {
        "method": name,
        "classes": dataset.classes,
        "images": dataset.available,
        "images_fingerprint": dataset.fingerprint,
        "tested_on": dataset.test_fingerprint,
        "images_per_step": dataset.train.batch,  # --batch 0 depends on the number of processes
        "one_tensor": isinstance(dataset.train.source, Tensors),  # of files: depends on --memory
        "teacher_weights": teacher.fingerprint if teacher else None,
    }
    if teacher and not teacher.settings:  # of others: it decides what the weights mean
        about["teacher_family"] = teacher.method
    if dataset.normalization != KINDS[settings.data].normalization:  # a teacher's was adopted
        about["normalization"] = dataset.normalization
    return about | {k: v for k, v in vars(settings).items() if k not in FREE}


def differences(before: dict, now: dict) -> list[str]:
    def shown(value) -> str:
        text = str(value) or "empty"
        return text if len(text) < 40 else f"{text[:36]} ..."

    # A setting added since that run counts as unset in it.
    odd = [k for k in before | now if (before.get(k) or None) != (now.get(k) or None)]
    return [f"{k} was {shown(before.get(k))}, now {shown(now.get(k))}" for k in odd]


def what_is_in(out: Path) -> dict | None:
    """What the run in a folder is, finished or not: {} if it is not said, None if there is none."""
    try:
        return dict(json.loads((out / "config.json").read_text())["run"])
    except (OSError, ValueError, LookupError, TypeError):
        return {} if any((out / name).exists() for name in LEFT_BEHIND) else None


def check(settings: Settings, name: str) -> None:
    """ValueError if --out cannot be made, or holds a run without --resume or --overwrite."""
    out, (_, place) = folder(settings, name), families.locate(getattr(settings, "teacher", ""))
    teacher = Path(place)
    if settings.resume and settings.overwrite:
        raise ValueError("--resume goes on, --overwrite starts over: choose one")
    storage.check_place(out / "config.json", f"--out {out}")
    if teacher.is_file() and out.resolve() in (teacher.resolve().parent, teacher.parent.resolve()):
        raise ValueError(f"--teacher {teacher} lies in --out: choose another --out")
    if settings.overwrite or (before := what_is_in(out)) is None:
        return
    if (out / "last.pt").exists():
        if not settings.resume:
            raise ValueError(
                f"{out} already holds a run: go on with --resume, start over with --overwrite, or "
                "choose another --out"
            )
    elif (out / "model.pt").exists():
        raise ValueError(
            f"{out} holds a model.pt and no last.pt to go on from: start over with --overwrite, or "
            "choose another --out"
        )
    elif not before:
        raise ValueError(
            f"{out} holds files that are named like a run's but are of none: choose another --out, "
            "or discard them with --overwrite"
        )


@contextlib.contextmanager
def locked(out: Path) -> Iterator[Path]:
    """The folder, made if need be, for this process alone; others end with one line.

    The lock goes with the process, however that ends.
    """
    out.mkdir(parents=True, exist_ok=True)
    if rank():
        yield out
        return
    with open(out / ".lock", "a") as file:
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(
                    f"another process is training in {out}: wait for it, or choose another --out"
                ) from None
            except OSError:  # a disk without locks
                pass
        yield out


def begin(out: Path, settings: Settings, run: dict) -> dict | None:
    """The state to go on from, or None to start over.

    ValueError rather than go on with another run, or with a damaged one.
    """
    last = out / "last.pt"
    if not (settings.resume and last.exists()):
        return None
    try:
        state = storage.read(last)
        before = dict(state["run"])
    except (ValueError, LookupError, TypeError) as error:  # it is damaged, or something else
        raise ValueError(
            f"cannot resume from {last}, which is damaged, or of something else "
            f"({type(error).__name__}: {str(error)[:80]}): start over with --overwrite"
        ) from error
    if odd := differences(before, run):
        more = f", and {len(odd) - 4} more" if len(odd) > 4 else ""
        raise ValueError(
            f"{out} holds another run ({'; '.join(odd[:4])}{more}): "
            "choose another --out, or start over with --overwrite"
        )
    threads = torch.get_num_threads()
    if state.get("device") == "cpu" and state.get("threads") != threads:
        print0(
            f"note: begun with {state.get('threads')} threads, now {threads}: sums are rounded "
            "differently (OMP_NUM_THREADS sets them), so it will not be the same to the bit"
        )
    return state


def clear(out: Path) -> None:
    """What an earlier run left is gone."""
    if rank() == 0:
        for name in LEFT_BEHIND:
            (out / name).unlink(missing_ok=True)


def describe(out: Path, run: dict, settings: Settings, device) -> None:
    """Writes config.json."""
    if rank() == 0:
        about = {"torch": torch.__version__, "on": str(device), "commit": commit(), "run": run}
        storage.write_text(out / "config.json", json.dumps(vars(settings) | about, indent=1))


def write_rows(out: Path, rows: list[dict]) -> None:
    if rank() == 0:
        storage.write_text(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def append_row(out: Path, row: dict) -> None:
    if rank() == 0:
        storage.append(out / "log.jsonl", json.dumps(row) + "\n")


def digest(run: dict) -> str:
    return hashlib.blake2b(json.dumps(run, sort_keys=True).encode(), digest_size=4).hexdigest()


def commit() -> str:
    """The commit of this repository, marked if the code has been changed since."""

    def git(*words: str) -> str:
        how = dict(capture_output=True, text=True, cwd=Path(__file__).parent)
        return subprocess.run(["git", *words], **how).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", "*.py", "digits.npz")
    except OSError:  # no git here
        return "unknown"
    return (head or "unknown") + (" with changes" if changed else "")
