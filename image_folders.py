"""Folders of images: which files there are, and of which class."""

from launch import print0

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets import imagenet
from torchvision.datasets.folder import IMG_EXTENSIONS


class Listing(NamedTuple):
    """The images below a folder, each with the number of its class."""

    classes: list[str]  # the names of the subfolders; [""] for a flat folder, without labels
    samples: list[tuple[str, int]]


def folder_of(settings) -> Path:
    return Path(settings.data_dir or f"data/{settings.data}")


def find(root: Path, train: bool, advice: str) -> dict[str, Listing]:
    """train/CLASS/* and val/CLASS/* (or valid, validation, test) below `root`: "train" and "test".

    Without val/ there is no "test"; train/CLASS/* may then lie in root/CLASS/*, or, without labels,
    in one flat folder. With train=False, "test" alone if it is there. FileNotFoundError if there
    are no images, with `advice`.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: {advice}")
    parts = parts_of(root)
    if "val" in parts and not train:
        return {"test": listing(parts["val"])}
    if "val" in parts and "train" not in parts:
        raise FileNotFoundError(f"{root} holds images to test on, and none to train on: {advice}")
    found = {"train": listing(parts.get("train") or root)}
    if "val" in parts:
        found["test"] = listing(parts["val"])
        odd = sorted(set(found["train"].classes) ^ set(found["test"].classes))
        if odd:
            raise ValueError(
                f"{root}/train and {root}/val have different classes: "
                f"{', '.join(odd[:5])} in one of them only"
            )
    return found


ARCHIVES = {"val": "ILSVRC2012_img_val.tar", "train": "ILSVRC2012_img_train.tar"}


def unpack(root: Path, train: bool = True) -> None:
    """ImageNet's archives, if they lie here, to train/ and val/ beside them, which are not yet.

    A part has its name when it is whole. ValueError if an archive is not what was published, or, of
    val/, if the archive that says its classes, or scipy, which reads that, is not there.
    """
    for part, archive in ARCHIVES.items():
        if part == "train" and not train:
            continue
        if not (root / archive).is_file() or (root / part).is_dir():
            continue
        print0(f"unpacking {archive}, once")
        unpacking = root / f".{part}-unpacking"
        shutil.rmtree(unpacking, ignore_errors=True)  # of a time before, cut short
        try:
            if part == "train":
                imagenet.parse_train_archive(root, folder=unpacking.name)
            else:
                imagenet.parse_devkit_archive(root)
                imagenet.parse_val_archive(root, folder=unpacking.name)
        except (RuntimeError, ImportError) as error:
            raise ValueError(
                f"cannot unpack {root / archive} ({error}); val/ needs "
                "ILSVRC2012_devkit_t12.tar.gz beside it as well, and scipy (pip install scipy)"
            ) from error
        unpacking.rename(root / part)


def parts_of(root: Path) -> dict[str, Path]:
    """The folders that hold images to train on ("train") and to test on ("val"), if there are.

    One of such a name that lies among others, and holds no folders, is a class.
    """
    known = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
    folders = [root / entry.name for entry in visible(root) if entry.is_dir()]
    if any(path.name.lower() not in sum(known.values(), ()) for path in folders):
        folders = [path for path in folders if any(entry.is_dir() for entry in visible(path))]
    found = {}
    for part, names in known.items():
        fit = [path for name in names for path in folders if path.name.lower() == name]
        if fit:
            found[part] = fit[0]
        if fit[1:]:
            print0(f"note: {fit[0]} is used, and {', '.join(map(str, fit[1:]))} is not")
    return found


def listing(folder: Path) -> Listing:
    """FileNotFoundError if the folder, or one of its classes, holds no image."""
    entries, others = visible(folder), []
    classes = [entry.name for entry in entries if entry.is_dir()]
    beside = [e.path for e in entries if e.name.lower().endswith(IMG_EXTENSIONS) or e.is_symlink()]
    beside = [path for path in beside if not os.path.isdir(path)]
    if classes and beside:
        print0(f"note: {len(beside)} files beside the classes are left out, such as {beside[0]}")
    above = (os.path.realpath(folder),) if classes else ()
    paths = {name: images_below(folder / name, others, above) for name in classes or [""]}
    if others:
        print0(f"note: {len(others)} files are no images of a known kind, such as {others[0]}")
    empty = [name for name, found in paths.items() if not found]
    if empty == [""]:
        raise FileNotFoundError(f"{folder} holds neither images nor folders of images")
    if empty:
        raise FileNotFoundError(
            f"{folder} is no folder of classes with images in them: there are none in "
            f"{', '.join(empty[:5])}"
        )
    samples = [(path, label) for label, name in enumerate(paths) for path in paths[name]]
    return Listing(list(paths), samples)


def images_below(folder: str | Path, others: list[str], above: tuple[str, ...] = ()) -> list[str]:
    """Paths of images; `others` gets those of other files.

    ValueError where a link leads back to a folder above it.
    """
    here, found = os.path.realpath(folder), []
    if here in above:
        link = next(path for path in (Path(folder), *Path(folder).parents) if path.is_symlink())
        raise ValueError(f"{link} is a link that leads back to {here}: remove the link")
    for entry in visible(folder):
        if entry.is_dir():
            found += images_below(entry.path, others, (*above, here))
        elif not entry.name.lower().endswith(IMG_EXTENSIONS):
            others.append(entry.path)
        elif entry.is_file() or entry.is_symlink():  # a link to nothing will be named as such
            found.append(entry.path)
    return found


def visible(folder: str | Path) -> list[os.DirEntry]:
    """What lies in a folder and is not hidden (as .ipynb_checkpoints is), in order."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
