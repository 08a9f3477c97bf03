"""Files written whole or not at all, and read without running anything that is in them."""

from launch import Failed

import contextlib
import errno
import os
import urllib.error
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch


def write(path: Path, fill: Callable) -> None:
    """A file that `fill(file)` fills. Until it is whole, what stood there before stays.

    Failed if the disk is full, or the folder cannot be written to.
    """
    part = path.with_name(path.name + ".part")
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is a folder or a device")
        with open(part, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        kept = f"; what was saved before is intact: {path}" if path.is_file() else ""
        raise Failed(f"could not write {path}: {reason}{kept}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def save(what: dict, path: Path) -> None:
    write(path, lambda file: torch.save(what, file))


def write_text(path: Path, text: str) -> None:
    write(path, lambda file: file.write(text.encode()))


def read(source: str | Path):
    """What torch.save wrote to a path or URL, on the CPU.

    ValueError if it is damaged, or holds more than tensors and plain values; FileNotFoundError if
    it is not there.
    """
    source = str(source)
    try:
        if source.startswith(("http://", "https://")):
            # A hash in its name (name-1a2b3c4d.pth) is checked.
            fetch = torch.hub.load_state_dict_from_url
            return fetch(source, map_location="cpu", weights_only=True, check_hash=True)
        if not Path(source).is_file():
            raise FileNotFoundError(f"no checkpoint at {source}")
        check(source)
        return torch.load(source, map_location="cpu", weights_only=True)
    except urllib.error.URLError as error:
        raise ValueError(
            f"cannot download {source} ({error.reason}): fetch it elsewhere and name the file"
        ) from error
    except FileNotFoundError:
        raise
    except Exception as error:  # unpickling errors are of many kinds
        if "://" in source:  # or it would be taken from there for ever
            cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(source).name
            cached.unlink(missing_ok=True)
        if getattr(error, "errno", None) in (errno.EIO, errno.ESTALE, errno.EACCES):
            raise  # of the disk, not of the file
        raise ValueError(
            f"{source} is no checkpoint that can be read safely: it is cut short or damaged, or "
            f"holds more than tensors ({type(error).__name__}: {str(error)[:80]})"
        ) from error


def check(path: str) -> None:
    """ValueError if a byte of the archive is not what was written. (Old files are no archives.)"""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise ValueError(f"{bad} has changed since it was written")
