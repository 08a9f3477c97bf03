"""Finds the teacher that --teacher asks for, or pre-trains one."""

import contextlib
import json
from dataclasses import fields, replace
from pathlib import Path

from common import runs
from common.checkpoints import Checkpoint
from common.launch import print0, run_first
from common.settings import get_values, parse_layers
from data import Data
from recipes import DATA_SETS, Images
from teachers import adapt
from teachers.load import make_config, read_checkpoint

BUNDLED = Path(__file__).parent.parent / "weights"  # made by study/ship.py


def find_teacher(settings, dataset: Data, get_script=None) -> Checkpoint | None:
    """The checkpoint that --teacher names, None for random and none.

    auto: the bundled one if it fits, MAE's for ImageNet, else the script of `get_script` makes one.
    """
    source: str | Path = settings.teacher
    if source == "random" and not hasattr(settings, "layers"):
        raise ValueError("--teacher random lends maps, not weights: from scratch is --teacher none")
    if source in ("none", "random"):
        return None
    if source == "mae" or (source, settings.data) == ("auto", "imagenet"):
        source = f"mae_pretrain_vit_{settings.model}"
    elif source == "auto" and (file := find_bundled(settings)):
        source = file
    elif source in ("auto", "pretrain"):
        config = make_config(settings, dataset)
        for name in ("layers", "teacher_layers", "heads"):  # found wrong before hours of training
            count = config.heads if name == "heads" else config.depth
            parse_layers(getattr(settings, name, "") or "all", count, name)
        own = dict(model=settings.model, patch=settings.patch, num_labels=0, subset_seed=-1)
        source = make_teacher(get_script(), settings, dataset, **own)
    checkpoint = read_checkpoint(source, settings.normalization)
    if not hasattr(settings, "layers"):  # fine-tuning
        asked, there = make_config(settings, dataset), checkpoint.architecture
        named = {name for name, flag in adapt.SIZE.items() if flag in settings.given}
        if "model" in settings.given and "=" in settings.model:  # with components
            others = {"image_size", "classes", "patch", "mean", "std", "pool"}
            named |= vars(asked).keys() - others
        if any(getattr(asked, name) != there.get(name) for name in named):
            raise ValueError(f"{source} does not match --model and --patch; omit them")
    ours, theirs = dataset.channels, checkpoint.architecture["channels"]
    if ours != theirs:
        raise ValueError(f"{source} takes images of {theirs} channels, and these have {ours}")
    if checkpoint.teacher:
        raise ValueError(f"{source} is a student of attention copy: name the teacher it had")
    if seen := dataset.count_learned(checkpoint.learned_from):
        print0(f"note: {source} was trained on {seen:,} of the test images")
    return checkpoint


def find_bundled(settings) -> Path | None:
    """The teacher in weights/ that was made for these images and this ViT, if there is one."""
    if settings.image_size == DATA_SETS[settings.data].image_size:
        settings = replace(settings, image_size=0)
    for about in BUNDLED.glob("*.json"):
        facts, file = json.loads(about.read_text()), about.with_suffix(".pt")
        if facts["for"].items() <= vars(settings).items():
            return file
    return None


def make_teacher(script, settings, dataset=None, **changes) -> Path:
    """The model.pt of a script's own recipe on the same images, trained now if need be."""
    own = script.parse(["--data", settings.data])
    shared = {f.name for f in fields(Images)} - {"given", "classes", "label", "dial"}
    shared |= {"seed", "amp", "compile", "num_labels", "subset_seed"}
    changes |= {"batch": min(own.batch, dataset.available)} if dataset else {}
    own = replace(own, **{name: getattr(settings, name) for name in shared} | changes)
    facts = get_values(own, free=False) | changes
    del facts["amp"]
    facts |= {"method": own.method, "images": dataset and (dataset.available, dataset.fingerprint)}
    name = f"teacher-{own.data}-{own.model}-{runs.hash_settings(facts)}"
    out = Path("runs") / name.replace("/", "-")
    own = replace(own, out=str(out), resume=True)
    runs.check_folder(settings)
    if dataset:
        dataset.check_classes()
    if not (out / "model.pt").is_file():
        runs.check_folder(own)
    with contextlib.ExitStack() as stack:  # locked until it is made: other processes wait for it
        run_first(lambda: stack.enter_context(runs.lock(out, wait=True)))
        if not (out / "model.pt").is_file():
            print0(f"No teacher in {out} yet: making one first, by its own recipe.")
            script.main(own)
            print0("The teacher is ready. Now the student:")
    return out / "model.pt"
