"""Finds the teacher that --teacher asks for, or pre-trains one, and pairs it with a student."""

import contextlib
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import torch

import vit
from common import runs
from common.checkpoints import Checkpoint
from common.launch import collect, print0, run_first, world
from common.settings import get_values, parse_layers
from data import Data
from recipes import Images, Settings, TransferSettings
from teachers.adapt import Teacher, adapt
from teachers.bundled import find_bundled
from teachers.load import build, build_vit, get_size, make_config, read_checkpoint


def find_teacher(settings: Settings, dataset: Data) -> Checkpoint | None:
    """The checkpoint that --teacher names, None for random and none.

    auto: the bundled one if it fits, MAE's for ImageNet, else pretrain.py makes one.
    """
    source: str | Path = settings.teacher
    transfers = isinstance(settings, TransferSettings)  # or fine-tunes
    if source == "random" and not transfers:
        raise ValueError("--teacher random lends maps, not weights: from scratch is --teacher none")
    if source in ("none", "random"):
        if settings.normalization:
            raise ValueError("--normalization is that of a teacher's file: here is none")
        return None
    asked = make_config(settings, dataset)
    if source == "mae" or (source, settings.data) == ("auto", "imagenet"):
        source = f"mae_pretrain_vit_{settings.model}"
    elif source == "auto" and (file := find_bundled(settings)):
        source = file
    elif source in ("auto", "pretrain"):
        for name in ("layers", "teacher_layers", "heads"):  # found wrong before hours of training
            count = asked.heads if name == "heads" else asked.depth
            parse_layers(getattr(settings, name, "") or "all", count, name)
        own = dict(model=settings.model, patch=settings.patch, num_labels=0, subset_seed=-1)
        source = make_teacher(import_module("pretrain"), settings, dataset, **own)
    theirs = (checkpoint := read_checkpoint(source, settings.normalization)).architecture
    if not transfers and any(theirs[k] != v for k, v in get_size(settings, asked).items()):
        raise ValueError(f"{source} does not match --model and --patch; omit them")
    if theirs["channels"] != asked.channels:
        raise ValueError(f"{source} takes {theirs['channels']} channels, not {asked.channels}")
    if checkpoint.teacher:
        raise ValueError(f"{source} is a student of attention copy: name the teacher it had")
    same_seed = checkpoint.settings.get("seed") == settings.seed  # which draws the first weights
    if transfers and same_seed and checkpoint.method not in ("pretrain", "finetune"):
        print0(f"note: {source} began with the student's first weights: take another --seed")
    if dataset.image_size // theirs["patch"] < 8 < theirs["image_size"] // theirs["patch"]:
        print0(f"note: {source} sees little at {dataset.image_size} pixels: try more --image-size")
    return checkpoint


def make_pair(
    settings: TransferSettings, dataset: Data, checkpoint: Checkpoint | None
) -> tuple[Teacher, vit.ViT, list[int]]:
    """A frozen teacher (`random` has no checkpoint), a random student, and its layers to teach."""
    if not checkpoint and settings.teacher != "random":
        raise ValueError("no maps without a teacher's checkpoint (finetune.py can do without)")
    config = asked = make_config(settings, dataset)
    if checkpoint:
        teacher = build_vit(checkpoint, dataset.image_size, classes=0)
        config = replace(teacher.config, classes=asked.classes, **get_size(settings, asked))
    torch.manual_seed(settings.seed)
    student = build(config, settings.drop_path, settings.positions)
    teacher = teacher if checkpoint else build(config, positions=settings.positions)
    layers, sources = parse_layers(settings.layers, config.depth), settings.teacher_layers
    sources = parse_layers(sources, teacher.config.depth, "teacher_layers") if sources else ()
    heads = parse_layers(settings.heads or "all", teacher.config.heads, "heads")
    teacher.to(device := dataset.train.device).eval().requires_grad_(False)
    return adapt(teacher, student, layers, sources, heads), student.to(device), layers


def make_teacher(script, settings: Settings, dataset: Data, **changes) -> Path:
    """The model.pt of a script's own recipe on the same images, trained now if need be."""
    flags = ["--recipe", settings.recipe] if settings.recipe else []
    own = script.parse(["--data", settings.data, *flags])
    shared = {f.name for f in fields(Images)} - {"given", "classes", "label", "dial"}
    shared |= {"seed", "amp", "compile", "num_labels", "subset_seed", "flip", "overwrite"}
    changes |= {"batch": min(own.batch, dataset.available) // world() * world()}
    own = replace(own, **{name: getattr(settings, name) for name in shared} | changes)
    facts = get_values(own, free=False) | changes
    del facts["amp"]
    facts |= {"method": own.method, "images": (dataset.available, dataset.fingerprint)}
    out = Path("runs", f"teacher-{own.data}-{own.model}-{runs.hash_settings(facts)}")
    own = replace(own, out=str(out), resume=not own.overwrite)
    runs.check_folder(settings)
    dataset.check_classes()
    if not (out / "model.pt").is_file():
        runs.check_folder(own)
    with contextlib.ExitStack() as stack:  # locked until it is made: other processes wait for it
        run_first(lambda: stack.enter_context(runs.lock(out, wait=True)))
        if not collect((out / "model.pt").is_file())[0]:  # whatever the others see by now
            print0(f"No teacher in {out} yet: making one first, by its own recipe.")
            script.main(own)
            print0("The teacher is ready. Now the student:")
    return out / "model.pt"
