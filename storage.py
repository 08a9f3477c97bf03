"""Files written whole or not at all, and read without running anything that is in them."""

from launch import Failed, first_alone, sigterm_as_exit

import contextlib
import errno
import hashlib
import os
import re
import urllib.error
import zipfile
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from pathlib import Path, PurePosixPath

import torch

import safetensors_file

DISK = (errno.EIO, errno.ESTALE, errno.EACCES)  # no fault of the file
HASHED = ("download.pytorch.org/", "dl.fbaipublicfiles.com/")  # whose names hold a file's hash


def write(path: Path, fill: Callable, ending: str = ".part") -> None:
    """A file that `fill(file)` fills. Until it is whole, what stood there before stays.

    `ending`: what its name ends in until then. Failed if the disk is full, or the folder cannot be
    written to.
    """
    part = path.with_name(path.name + ending)
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is a folder or a device")
        with open(part, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # what torch.save met
        reason = getattr(cause, "strerror", None) or str(error)
        kept = f"; what was saved before is intact: {path}" if path.is_file() else ""
        raise Failed(f"could not write {path}: {reason}{kept}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def check_place(path: Path, flag: str, *kinds: str) -> None:
    """ValueError if no file can be written at a path: before the work that it is to keep.

    `kinds`: what its name must end in, lest it be a file of something else.
    """
    above = next(place for place in path.parents if place.exists())
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file")
    if kinds and path.name == "config.json":
        raise ValueError(f"{flag} {path}: a run keeps its settings by this name: choose another")
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{flag}: {above} is not a writable folder: choose another place")
    if kinds and path.suffix not in kinds:
        raise ValueError(f"{flag} {path}: its name must end in {' or '.join(kinds)}")


def append(path: Path, text: str) -> None:
    """Failed as of `write`."""
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError as error:
        raise Failed(f"could not write {path}: {error.strerror}") from error


def save(what: dict, path: Path) -> None:
    write(path, lambda file: torch.save(what, file))


def write_text(path: Path, text: str) -> None:
    """Several processes may write the same one."""
    write(path, lambda file: file.write(text.encode()), f".{os.getpid()}.part")


def read(source: str | Path):
    """What torch.save wrote to a path or URL, or the tensors of a safetensors file, on the CPU.

    ValueError if it is damaged, or holds more than tensors and plain values; FileNotFoundError if
    it is not there.
    """
    path = fetched(str(source)) if is_url(source) else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {source}")
    try:
        if path.suffix.lower() == ".safetensors" or safetensors_file.begins(path):
            return safetensors_file.read(path)
        check(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling errors are of many kinds
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in DISK:
            raise  # of the machine, not of the file
        if is_url(source):  # or it would be taken from there for ever
            path.unlink(missing_ok=True)
        raise ValueError(
            f"{source} is no checkpoint that can be read safely: it is cut short or damaged, or "
            f"holds more than tensors ({type(error).__name__}: {str(error)[:80]})"
        ) from error


def is_url(source: str | Path) -> bool:
    return str(source).startswith(("http://", "https://"))


def fetched(url: str) -> Path:
    """The file at a URL, downloaded if it was not before; a part of it never has its name.

    A hash behind it (#md5=1a2b3c) is checked; one in its name (name-1a2b3c4d.pth) of HASHED.
    """
    url, _, wanted = url.partition("#")
    if wanted and not re.fullmatch(r"md5=[0-9a-fA-F]{6,32}", wanted):
        raise ValueError(
            f"{url}#{wanted}: behind # may stand md5= and 6 to 32 digits, to be checked"
        )
    path = kept_at(url)
    get = partial(fetch, url, wanted.removeprefix("md5=").lower(), path)
    first_alone(get)
    get()  # on other machines
    return path


def kept_at(url: str) -> Path:
    """Where the file at a URL lies once it was downloaded. ValueError if it can be none."""
    url = url.partition("#")[0]
    plain, _, query = url.partition("?")
    place = PurePosixPath(plain.split("://")[1])
    if ".." in place.parts or not place.suffix:
        raise ValueError(f"{url} names no file that could be downloaded")
    if query:  # another file, perhaps, of the same name
        place = place.parent / hashlib.md5(query.encode()).hexdigest() / place.name
    return Path(torch.hub.get_dir()) / "checkpoints" / place


def fetch(url: str, wanted: str, path: Path) -> None:
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    named = re.search(r"-([0-9a-f]{8,})\.", path.name)
    named = named if url.split("://")[1].startswith(HASHED) else None
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with sigterm_as_exit():
            torch.hub.download_url_to_file(url, str(part), named and named[1])
        if wanted and not md5(part).startswith(wanted):
            raise ValueError("it is not the file that its authors published: its md5 differs")
        os.replace(part, path)
    except urllib.error.HTTPError as error:
        advice = "fetch it elsewhere and name the file"
        if error.code in (401, 403):
            advice = (
                "its authors give it to those who accept their licence: do so on its page, "
                "download it with your account, and write NAME=FILE"
            )
        raise ValueError(f"cannot download {url} ({error}): {advice}") from error
    except (OSError, RuntimeError, HTTPException, ValueError) as error:  # RuntimeError: a hash
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"cannot download {url} ({reason}): fetch it elsewhere and name the file"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def check(path: Path) -> None:
    """ValueError if a byte of the archive is not what was written. (Old files are no archives.)"""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise ValueError(f"{bad} has changed since it was written")
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError("it is a TorchScript program, which is not run here")
