"""Teachers: found or made; and a student that can take a teacher's maps."""

from collections.abc import Sequence
from pathlib import Path

import torch

import checkpoints
import data
import launch
import pretrain
import train
import vit
from checkpoints import Checkpoint
from launch import print0
from settings import IMAGES, Settings

# The teachers of the paper, as their authors publish them. "huge" has patches of 14 pixels.
MAE_WEIGHTS = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_{}.pth"
MAE_SIZES = ("base", "large", "huge")


def find(settings: Settings) -> Checkpoint | None:
    """The checkpoint that --teacher names: auto, mae, a path or URL; None for random and none.

    auto is a ViT pre-trained here: it is made first if it is not there yet. For ImageNet, where
    that takes days, auto is MAE's published one.
    """
    if settings.teacher in ("none", "random"):
        return None
    made_here = data.KINDS[settings.data].recipe < 2  # digits, CIFAR
    if settings.teacher == "mae" or (settings.teacher == "auto" and not made_here):
        if settings.model not in MAE_SIZES:
            raise ValueError(
                f"MAE published no '{settings.model}' teacher: choose --model base, large or "
                "huge, or pre-train one (pretrain.py) and name it with --teacher"
            )
        _, _, heads = vit.SIZES[settings.model]
        return checkpoints.read(MAE_WEIGHTS.format(settings.model), heads)
    if settings.teacher == "auto":
        return checkpoints.read(pretrained(settings))
    checkpoint = checkpoints.read(settings.teacher, settings.teacher_heads)
    if checkpoint.teacher:
        raise ValueError(
            f"{settings.teacher} is a student of attention copy: it never learned where to look "
            "by itself, so it can be no teacher (name the teacher it had)"
        )
    return checkpoint


def pretrained(settings: Settings) -> Path:
    """The model.pt of a teacher for these settings, pre-trained now if it is not there."""
    shared = (*IMAGES, "model", "patch", "seed", "device", "amp", "compile", "save_every")
    shared = {k: v for k, v in vars(settings).items() if k in shared}
    own = pretrain.parse(["--data", settings.data]).but(**shared)
    own = own.but(num_labels=0, holdout=0, resume=True)
    model = checkpoints.run_folder(own, "pretrain") / "model.pt"
    if not model.is_file():
        print0(f"No teacher at {model} yet: pre-training one first.")
        train.fit(pretrain.task(own), own)
        print0("The teacher is ready. Now the student:")
    return model


def teacher_and_student(
    settings: Settings, images: data.Data | None = None
) -> tuple[vit.ViT, vit.ViT, list[int], data.Data]:
    """A frozen teacher, a random student, layers to transfer, images normalised for the teacher.

    `images`: others than those that the settings name.
    """
    device = launch.device(settings.device)
    checkpoint = find(settings)
    if settings.teacher == "none":
        raise ValueError(
            "--teacher none: there is nothing to transfer without a teacher "
            "(finetune.py trains from scratch)"
        )
    images = images or data.load(settings, device, checkpoint and checkpoint.normalization)
    shape = images.vit_shape(settings.patch)
    torch.manual_seed(settings.seed)
    student = vit.build(settings.model, **shape, drop_path=settings.drop_path)
    if checkpoint:
        teacher = checkpoints.load(checkpoint, image_size=images.image_size, classes=0)
    else:
        teacher = vit.build(settings.model, **shape)
    layers = parse_layers(settings.layers, len(student.blocks))
    check_loan(teacher, student, layers)
    return teacher.to(device).eval().requires_grad_(False), student.to(device), layers, images


def parse_layers(text: str, depth: int) -> list[int]:
    """Block numbers from '18' (the first 18), '6-11' or '0,2,4-7' (counted from 0), or 'all'."""
    try:
        if text == "all":
            layers = list(range(depth))
        elif text.isdigit():
            layers = list(range(int(text)))
        else:
            spans = [part.split("-", 1) for part in text.split(",")]
            layers = sorted({i for span in spans for i in range(int(span[0]), int(span[-1]) + 1)})
    except ValueError:
        raise ValueError(
            f"--layers {text}: write a count (18), a range (6-11), a list (0,2,4-7) or 'all'"
        ) from None
    if not layers or layers[-1] >= depth:
        raise ValueError(
            f"--layers {text}: choose at least one of this model's {depth} layers "
            f"(0 to {depth - 1})"
        )
    return layers


def check_loan(teacher: vit.ViT, student: vit.ViT, layers: Sequence[int]) -> None:
    """ValueError unless the teacher's maps of its images fit the student. Widths may differ."""
    for what, ours in counts(student).items():
        theirs = counts(teacher)[what]
        if ours != theirs:
            raise ValueError(
                f"the teacher has {theirs} {what} and the student {ours}: choose --model, --patch, "
                "--data or --teacher so that they agree"
            )
    if layers[-1] >= len(teacher.blocks):
        raise ValueError(
            f"--layers goes up to layer {layers[-1]}, "
            f"but the teacher has {len(teacher.blocks)} layers"
        )


def counts(net: vit.ViT) -> dict[str, int]:
    """What must be equal for a map of one ViT to be one of another's, on the same images."""
    return {"heads": net.heads, "tokens": net.tokens, "channels": net.architecture["channels"]}
