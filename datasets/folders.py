"""Folders of images: which files there are, of which class, and which of them are held out."""

import os
import re
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchvision.datasets.folder import is_image_file

from common.launch import print0
from datasets.sources import Parts

ADVICE = "point --data-dir at a folder that holds train/CLASS/* and val/CLASS/*, or CLASS/*"
PARTS = {"train": "train training", "val": "val valid validation", "test": "test testing"}
PART_OF = {name: part for part, names in PARTS.items() for name in names.split()}
METADATA = re.compile(  # folders of NAS, desktops and archives for thumbnails, bins and such
    r"(?i)[.@~]|__|(_?thumb(nail)?s|#recycle|#snapshot|\$recycle\.bin|recycler|lost\+found"
    r"|system volume information|network trash folder)$"
)


class Listing(NamedTuple):
    classes: list[str]  # names of the subfolders; [""] for a flat folder without labels
    paths: list[str]
    labels: list[int]  # numbers of classes
    names: list[str]  # CLASS/.../FILE, the same wherever the folder lies and whatever its disk


def load(settings, row, size: int, device, with_train: bool = True) -> Parts:
    """The images of --data-dir, without those that cannot be read."""
    from datasets import images  # slow to import

    folder, sources = Path(settings.data_dir or f"data/{settings.data}"), dict[str, Any]()
    for part, (classes, paths, labels, names) in (listed := list_parts(folder)).items():
        if part == "train" and len(listed) > 1 and not with_train and settings.holdout <= 0:
            continue  # evaluation has others, and need not open a million files
        files = images.Files(paths, names, torch.tensor(labels), size, row, settings, device)
        sources[part] = files.look_through()
    train, val, test = map(sources.get, PARTS)
    return Parts(classes, train, val if test else None, test or val)


def list_parts(root: Path) -> dict[str, Listing]:
    """The images of root/PART/CLASS/* for train, val and test; else those of root/CLASS/* as train.

    Without labels they may lie in one flat folder. FileNotFoundError without any. ValueError if
    some images would be ignored.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: {ADVICE}")
    folders = [name for name in reversed(list_subfolders(root)) if name.lower() in PART_OF]
    parts = {PART_OF[name.lower()]: root / name for name in folders}
    classes = {to_nfc(name) for folder in parts.values() for name in list_subfolders(folder)}
    if not classes and len(parts) < 2:  # one without subfolders is a class
        return {"train": list_images(root)}
    used = {folder.name for folder in parts.values()}
    if odd := next(filter(is_image_file, walk(root, [], used)), None):
        raise ValueError(f"{odd} lies beside {', '.join(sorted(used))}: move such images away")
    return {part: list_images(folder, classes) for part, folder in parts.items()}


def to_nfc(name: str) -> str:
    """A name in one form: a disk may write "é" as one character or as two."""
    return unicodedata.normalize("NFC", name)


def list_subfolders(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not METADATA.match(e.name))


def walk(root: Path, skipped: list[str], without: Collection[str] = ()) -> Iterator[str]:
    """Paths of all files in a folder and deeper, in order, without hidden ones and metadata.

    `skipped` grows by the folders of metadata.
    """
    for place, folders, files in os.walk(root, followlinks=True):
        skip = {*filter(METADATA.match, folders)}
        skipped += [os.path.join(place, x) for x in sorted(skip) if not x.startswith(".")]
        skip |= {*without} if place == str(root) else set()
        folders[:] = sorted({*folders} - skip)
        yield from (os.path.join(place, x) for x in sorted(files) if not x.startswith("."))


def list_images(folder: Path, classes: Collection[str] = ()) -> Listing:
    """Those of some classes [its subfolders]. FileNotFoundError without any."""
    skipped: list[str] = []
    files = [*walk(folder, skipped)]
    paths = [*filter(is_image_file, files)]
    if others := sorted({*files}.difference(paths)):
        print0(f"note: {len(others)} files are not images of a known kind, such as {others[0]}")
    if not paths:
        raise FileNotFoundError(f"{folder} holds no images: fill or remove it")
    known = sorted(classes or {to_nfc(name) for name in list_subfolders(folder)})
    names = [to_nfc(path[len(str(folder)) + 1 :]).replace(os.sep, "/") for path in paths]
    if known:
        check_layout(folder, names)
    if skipped:
        print0(f"note: {len(skipped)} folders ignored, as thumbnails or the like: {skipped[0]}")
    numbers = {name: number for number, name in enumerate(known)}
    labels = [numbers[name.partition("/")[0]] if known else 0 for name in names]
    return Listing(known or [""], paths, labels, names)


def check_layout(folder: Path, names: list[str]) -> None:
    """ValueError if some of CLASS/.../FILE have no class, or one that mixes train and val."""
    if odd := next((name for name in names if "/" not in name), None):
        remedy = "sort them (USAGE.md, Prepare ImageNet), or move them away"
        raise ValueError(f"{folder / odd} lies in no folder of a class: {remedy}")
    inner = sorted({tuple(name.split("/")[:2]) for name in names if name.count("/") > 1})
    parts = {(name, PART_OF[x.lower()]) for name, x in inner if x.lower() in PART_OF}
    if len(parts) > len({name for name, _ in parts}):
        raise ValueError(f"{folder / min(parts)[0]} has parts (train, val): point --data-dir at it")
    if inner:
        name, x = inner[0]
        words = {word for outer, _ in inner for word in re.split(r"[\W\d_]+", outer.lower())}
        if len({PART_OF[word] for word in words if word in PART_OF}) > 1:
            raise ValueError(f"{folder}: {name} and others are parts: call them train, val, test")
        print0(f"note: {folder}: images in {name}/{x} count for {name}, and so in all such folders")
