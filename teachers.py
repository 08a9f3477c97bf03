"""Teachers: found or made; and a student that can take a teacher's maps."""

import launch
from launch import print0

import hashlib
import json
from pathlib import Path

import torch

import checkpoints
import data
import pretrain
import runs
import train
import vit
from checkpoints import Checkpoint, check_loan
from settings import IMAGES, Settings

# The teachers of the paper, as their authors publish them. "huge" has patches of 14 pixels.
MAE_WEIGHTS = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_{}.pth"
MAE_SIZES = ("base", "large", "huge")
NAMED = ("auto", "pretrain", "mae", "random", "none")
SHIPPED = Path(__file__).parent / "weights"  # made by experiments/ship.py


def find(settings: Settings, images: data.Data) -> Checkpoint | None:
    """The checkpoint that --teacher names, a word or a path or URL; None for random and none.

    pretrain is a ViT pre-trained here on `images`, made first if it is not there yet. auto is one
    that comes with this repository, if there is one for these images and this net; for ImageNet,
    where pre-training takes days, MAE's published one; else pretrain.
    """
    if settings.teacher in ("none", "random"):
        return None
    if published(settings):
        _, _, heads = vit.SIZES[settings.model]
        return checkpoints.read(MAE_WEIGHTS.format(settings.model), heads)
    if settings.teacher == "auto" and (file := shipped(settings)):
        return checkpoints.read(file)
    if settings.teacher in ("auto", "pretrain"):
        model = pretrained(settings, images)
        try:
            return checkpoints.read(model)
        except ValueError as error:
            raise ValueError(f"{error}: remove {model.parent}, and it is made anew") from error
    checkpoint = checkpoints.read(settings.teacher, settings.teacher_heads)
    if checkpoint.teacher:
        raise ValueError(
            f"{settings.teacher} is a student of attention copy: it never learned where to look "
            "by itself, so it can be no teacher (name the teacher it had)"
        )
    return checkpoint


def published(settings: Settings) -> bool:
    """Whether the teacher is one of MAE's authors."""
    return settings.teacher == "mae" or (settings.teacher, settings.data) == ("auto", "imagenet")


def shipped(settings: Settings) -> Path | None:
    """The teacher of weights/ that was made for these images and this net. None if none was."""
    for about in SHIPPED.glob("*.json"):
        facts = json.loads(about.read_text())
        if all(getattr(settings, name) == value for name, value in facts["for"].items()):
            file = about.with_suffix(".pt")
            if hashlib.sha256(file.read_bytes()).hexdigest() != facts["sha256"]:
                raise ValueError(
                    f"{file} is not the file that {about.name} describes: fetch it anew, or make a "
                    "teacher with --teacher pretrain"
                )
            return file
    return None


def check(settings: Settings) -> None:
    """ValueError if --teacher names what is not there: before anything is read or made."""
    if published(settings) and settings.model not in MAE_SIZES:
        raise ValueError(
            f"MAE published no '{settings.model}' teacher: choose --model base, large or "
            "huge, or pre-train one (pretrain.py) and name it with --teacher"
        )
    a_file = settings.teacher not in NAMED and "://" not in settings.teacher
    if a_file and not Path(settings.teacher).is_file():
        raise FileNotFoundError(f"no checkpoint at {settings.teacher}")


def pretrained(settings: Settings, images: data.Data) -> Path:
    """The model.pt of a teacher for these settings and images, pre-trained now if need be.

    One that was made otherwise is left alone: the new one goes to a folder beside it.
    """
    shared = (*IMAGES, "model", "patch", "seed", "device", "amp", "compile", "save_every")
    shared = {k: v for k, v in vars(settings).items() if k in shared}
    own = pretrain.parse(["--data", settings.data]).but(**shared).but(num_labels=0, subset_seed=-1)
    wanted = what_counts(runs.identity("pretrain", images, None, own))
    out = runs.folder(own, "pretrain")
    found = runs.what_is_in(out)
    if found is not None and (odd := runs.differences(what_counts(found), wanted)):
        how = f"made otherwise ({'; '.join(odd[:3])})" if found else "of unknown origin"
        print0(f"The teacher in {out} is {how}; to use it, name its model.pt by --teacher.")
        out = out.with_name(f"{out.name}-{runs.digest(wanted)}")
        found = runs.what_is_in(out)
    if found and (out / "model.pt").is_file():
        return out / "model.pt"
    if found:
        print0(f"The teacher in {out} is not finished: going on with it first.")
        own = own.but(amp=found["amp"], resume=True)
    else:
        print0(f"No teacher in {out} yet: pre-training one first.")
    own = own.but(out=str(out))
    try:
        train.fit(pretrain.task(own), own)
    except ValueError as error:
        raise ValueError(f"the teacher in {out}: {error}; or remove that folder") from error
    print0("The teacher is ready. Now the student:")
    return out / "model.pt"


def what_counts(run: dict) -> dict:
    """Of what a run is, what makes its teacher another one: not how its sums are rounded."""
    return {k: v for k, v in run.items() if k not in ("amp", "images_per_step", "one_tensor")}


def teacher_and_student(settings: Settings, images: data.Data | None = None):
    """A frozen teacher, a random student, layers to transfer, images normalised for the teacher.

    And the checkpoint of the teacher (None for a random one). `images`: others than those that the
    settings name. All that can be wrong is found before a teacher is made or fetched.
    """
    if settings.teacher == "none":
        raise ValueError(
            "--teacher none: there is nothing to transfer without a teacher "
            "(finetune.py trains from scratch)"
        )
    device = launch.device(settings.device)
    check(settings)
    layers = parse_layers(settings.layers, depth=vit.SIZES[settings.model][1])
    images = images or data.load(settings, device)
    shape = images.vit_shape(settings.patch)
    torch.manual_seed(settings.seed)
    student = vit.build(settings.model, **shape, drop_path=settings.drop_path)
    if settings.teacher == "random":
        checkpoint, teacher = None, vit.build(settings.model, **shape)
    else:
        checkpoint = find(settings, images)
        teacher = checkpoints.load(checkpoint, image_size=images.image_size, classes=0)
        images.adopt(checkpoint)
    check_loan(teacher, student, layers)
    teacher.to(device).eval().requires_grad_(False)
    return teacher, student.to(device), layers, images, checkpoint


def parse_layers(text: str, depth: int) -> list[int]:
    """Block numbers from '18' (the first 18), '6-11' or '0,2,4-7' (counted from 0), or 'all'."""
    try:
        if text == "all":
            spans = [(0, depth - 1)]
        elif text.isdigit():
            spans = [(0, int(text) - 1)]
        else:
            parts = [part.split("-", 1) for part in text.split(",")]
            spans = [(int(part[0]), int(part[-1])) for part in parts]
    except ValueError:
        raise ValueError(
            f"--layers {text}: write a count (18), a range (6-11), a list (0,2,4-7) or 'all'"
        ) from None
    if not all(0 <= first <= last < depth for first, last in spans):
        raise ValueError(
            f"--layers {text}: choose at least one of this model's {depth} layers "
            f"(0 to {depth - 1})"
        )
    return sorted({i for first, last in spans for i in range(first, last + 1)})
