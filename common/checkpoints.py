"""Checkpoints: saved atomically, read without running anything in them.

A model.pt of ours is a dict: `model` (weights), `architecture` (fields of vit.Config), `classes`,
`method`, `settings`. A student of attention copy also brings its `teacher`.
"""

import argparse
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.launch import Failed, is_out_of_memory, run_first

KNOWN = {"classes", "method", "settings", "learned_from", "layers", "adapted"}  # in a model.pt
KINDS = {"F": "float", "BF": "bfloat", "I": "int"}  # F32 is torch.float32 in safetensors


@dataclass(frozen=True)
class Checkpoint:
    """What a file says of a ViT."""

    source: str
    weights: dict[str, Tensor] = field(repr=False)  # long
    architecture: dict[str, Any]  # fields of vit.Config, or of teachers.vit.Config
    classes: list[str] | None = None
    method: str = "?"
    settings: dict[str, Any] = field(default_factory=dict)  # of the run that made it
    learned_from: Tensor | None = None  # hashes of its training images, for image folders
    teacher: "Checkpoint | None" = None  # of a student of attention copy: whose maps it uses,
    layers: tuple[int, ...] = ()  # in which blocks,
    adapted: dict[str, list[int]] = field(default_factory=dict)  # and how they were adapted to it
    resize: Any = None  # how its family resizes positions (teachers/positions.py)

    def __post_init__(self):
        for name, value in self.weights.items():
            if value.dtype in (torch.int8, torch.uint8) or not value.isfinite().all():
                raise ValueError(f"{self.source}: {name} is quantised or not finite, take another")

    def __str__(self) -> str:
        return f"{self.source} ({self.method}, weights {fingerprint(self.weights)})"


def fingerprint(weights: dict[str, Tensor]) -> str:
    """12 hex digits that depend on the weights alone."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def export(net, teacher=None, layers=()) -> dict[str, Any]:
    """What model.pt holds of a ViT. `teacher`: of a student of attention copy, in `layers`."""
    found: dict[str, Any] = {"model": net.state_dict(), "architecture": asdict(net.config)}
    if teacher:
        source = getattr(teacher, "teacher", teacher)  # inside an adapter
        found |= {"teacher": export(source), "adapted": getattr(teacher, "adapted", {})}
        found["layers"] = tuple(layers)
    return found


def parse_ours(found: dict[str, Any], source: str) -> Checkpoint:
    """The contents of a model.pt of ours. ValueError if it is none."""
    weights, shape = found.get("model"), found["architecture"]
    if not (isinstance(weights, dict) and isinstance(shape, dict) and "image_size" in shape):
        raise ValueError(f"{source} is no checkpoint of ours: save its weights alone")
    if older := found.get("normalization"):  # ViTs did not yet know their own
        shape = {"mean": tuple(older[0]), "std": tuple(older[1])} | shape
    known = {k: v for k, v in found.items() if k in KNOWN and v is not None}
    if "teacher" in found:
        known["teacher"] = parse_ours({"normalization": older} | found["teacher"], source)
    return Checkpoint(source, weights, shape, **known)


def save(contents: dict | str | Callable, path: Path) -> None:
    """Writes a text, calls `contents(file)`, or saves with torch, and then replaces the old file.

    Failed if that does not work.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            if callable(contents):
                contents(file)
            elif isinstance(contents, str):
                file.write(contents.encode())
            else:
                torch.save(contents, file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        met = error if isinstance(error, OSError) else error.__context__  # by torch.save
        if isinstance(met, KeyboardInterrupt):
            raise met from None
        kept = ": the old file is intact" if path.is_file() else ""
        raise Failed(f"could not write {path} ({met or error}){kept}") from error
    finally:
        part.unlink(missing_ok=True)


def check_place(path: Path, name: str, *suffixes: str) -> None:
    """ValueError, before the work, if its result cannot be written to this path."""
    above = next(filter(Path.exists, path.parents))
    if path.is_dir() or (suffixes and path.suffix not in suffixes):
        raise ValueError(f"{name} {path}: name a file that ends in {' or '.join(suffixes)}")
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{name}: {above} is not a writable folder, choose another place")


def read_file(source: str | Path) -> Any:
    """What torch.save or safetensors wrote to a path or URL. ValueError for any other file."""
    place = os.path.expanduser(source)
    path = download(place) if re.match("https?://", place) else Path(place)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {source}")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():  # torch.load does not look
                    raise ValueError(f"{bad} has changed since it was written")
        with torch.serialization.safe_globals([argparse.Namespace]):  # nothing but fields
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling errors are of many kinds
        if is_out_of_memory(error):  # not the file's fault
            raise
        reason = f"{type(error).__name__}: {str(error).partition('. ')[0][:80]}"
        advice = f"replace or remove {path}, or save its weights alone"
        raise ValueError(f"{source} cannot be read as a checkpoint ({reason}): {advice}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: the length of a header in JSON, the header, and raw bytes."""
    whole = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)  # mapped
    begin = 8 + int.from_bytes(whole[:8].numpy(), "little")
    header, found = json.loads(whole[8:begin].numpy().tobytes()), {}
    header.pop("__metadata__", None)
    for name, about in header.items():
        first, last = about["data_offsets"]
        part = whole[begin + first : begin + last].clone()  # aligned, and in memory
        dtype = getattr(torch, KINDS[about["dtype"][:-2]] + about["dtype"][-2:])
        found[name] = part.view(dtype).view(about["shape"])
    return found


def download(url: str) -> Path:
    """The file at a URL, downloaded once. A hash in its name is checked."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.split("://")[1].partition("?")[0])
    named = re.search(r"-([0-9a-f]{8,})\.", path.name)
    get = partial(torch.hub.download_url_to_file, url, str(path), named and named[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        run_first(lambda: path.is_file() or get())
        path.is_file() or get()  # on the other machines
    except (OSError, RuntimeError) as error:
        remedy = "accept its licence in a browser if it has one, download it, and write NAME=FILE"
        raise ValueError(f"cannot download {url} ({error}): {remedy}") from error
    return path
