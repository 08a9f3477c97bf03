"""Folders of images: which files there are, of which class, and which of them are held out."""

import os
import unicodedata
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from common.launch import print0
from datasets.sources import Parts

ADVICE = "point --data-dir at a folder that holds train/CLASS/* and val/CLASS/*, or CLASS/*"
PARTS = {"train": "train training", "val": "val valid validation", "test": "test testing"}


class Listing(NamedTuple):
    folder: Path
    classes: list[str]  # names of the subfolders; [""] for a flat folder without labels
    samples: list[tuple[str, int]]  # path, number of the class


def load(settings, kind, size: int, device) -> Parts:
    """The images of --data-dir."""
    from datasets import images

    folder, sources = Path(settings.data_dir or f"data/{settings.data}"), {}
    for part, found in list_parts(folder).items():
        how = (size, kind.crop_pct, settings, kind.mean, device)
        sources[part] = images.Files(found.samples, name_images(found), *how)
    train, val, test = (sources.get(part) for part in ("train", "val", "test"))
    return Parts(found.classes, train, val if test else None, test or val)


def list_parts(root: Path) -> dict[str, Listing]:
    """The images of root/PART/CLASS/* for train, val and test; else those of root/CLASS/* as train.

    Without labels they may lie in one flat folder. FileNotFoundError without any.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: {ADVICE}")
    folders = list_subfolders(root)
    fit = {
        part: root / name
        for part, names in PARTS.items()
        for name in reversed(folders) if name.lower() in names.split()
    }  # fmt: skip
    labelled = {part: folder for part, folder in fit.items() if list_subfolders(folder)}
    chosen = labelled or (fit if len(fit) > 1 else {})  # one without subfolders is a class
    parts = {part: list_images(folder) for part, folder in chosen.items()}
    if not parts:
        return {"train": list_images(root)}
    used = [str(listing.folder) for listing in parts.values()]
    if beside := [name for name in folders if str(root / name) not in used]:
        print0(f"note: using {', '.join(used)}, ignoring {', '.join(beside[:5])} beside them")
    classes = [set(listing.classes) for listing in parts.values()]
    if odd := sorted(classes[0].union(*classes) - classes[0].intersection(*classes)):
        raise ValueError(f"{root}: {' and '.join(parts)} have different classes ({odd[0]})")
    return parts


def list_subfolders(folder: Path) -> list[str]:
    """Their names, without hidden ones (.ipynb_checkpoints)."""
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def list_images(folder: Path) -> Listing:
    """FileNotFoundError names a class without images."""
    others: list[str] = []

    def is_image(path: str) -> bool:
        if f"{os.sep}." in path.removeprefix(str(folder)):  # hidden, or in a hidden folder
            return False
        if not path.lower().endswith(IMG_EXTENSIONS):
            others.append(path)
        return path.lower().endswith(IMG_EXTENSIONS)

    classes = list_subfolders(folder)
    numbers = {name: number for number, name in enumerate(classes)}
    if classes:
        samples = make_dataset(str(folder), numbers, is_valid_file=is_image, allow_empty=True)
        if empty := numbers.keys() - {classes[number] for _, number in samples}:
            where = folder / min(empty)
            raise FileNotFoundError(f"{where} holds no image that we can read: fill or remove it")
    else:
        files = sorted(entry.path for entry in os.scandir(folder) if entry.is_file())
        samples = [(path, 0) for path in files if is_image(path)]
    if not samples:
        raise FileNotFoundError(f"{folder} holds neither images nor folders of images")
    if others:
        print0(f"note: {len(others)} files are not images of a known kind, such as {others[0]}")
    return Listing(folder, classes or [""], samples)


def name_images(listing: Listing) -> list[str]:
    """CLASS/.../FILE of each, the same wherever the folder lies and whatever its file system."""
    paths = (os.path.relpath(path, listing.folder) for path, _ in listing.samples)
    return [unicodedata.normalize("NFC", path.replace(os.sep, "/")) for path in paths]
