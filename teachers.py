"""Teachers: found or made; and a student that can take a teacher's maps.

    python teachers.py             lists those that can be had by name
    python attention_distill.py --data imagenet \\
        --teacher vit_base_patch14_dinov2.lvd142m
"""

import launch
from launch import print0

import difflib
import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import checkpoints
import data
import families
import pretrain
import runs
import train
import vit
from checkpoints import Checkpoint
from lending import Lender, lender, parse_layers
from settings import IMAGES, Setting, Settings, parse_settings

MAE = "mae_pretrain_vit_{}"  # the teachers of the paper, as their authors publish them
MAE_SIZES = ("base", "large", "huge")  # "huge" has patches of 14 pixels
NAMED = ("auto", "pretrain", "mae", "random", "none")
SHIPPED = Path(__file__).parent / "weights"  # made by experiments/ship.py


def find(settings: Settings, dataset: data.Data) -> Checkpoint | None:
    """The checkpoint that --teacher names, a word or a path or URL; None for random and none.

    pretrain is a ViT pre-trained here on `dataset`, made first if it is not there yet. auto is one
    that comes with this repository, if there is one for these images and this net; for ImageNet,
    where pre-training takes days, MAE's published one; else pretrain.
    """
    if settings.teacher in ("none", "random"):
        return None
    if published(settings):
        return checkpoints.read(MAE.format(settings.model))
    if settings.teacher == "auto" and (file := shipped(settings)):
        return checkpoints.read(file)
    if settings.teacher in ("auto", "pretrain"):
        model = pretrained(settings, dataset)
        try:
            return checkpoints.read(model)
        except ValueError as error:
            raise ValueError(f"{error}: remove {model.parent}, and it is made anew") from error
    checkpoint = checkpoints.read(settings.teacher, settings.teacher_heads)
    if settings.teacher_heads not in (0, heads := checkpoint.architecture["heads"]):
        raise ValueError(
            f"--teacher-heads {settings.teacher_heads}: {settings.teacher} has {heads}"
        )
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
        try:
            facts = json.loads(about.read_text())
        except ValueError as error:
            raise ValueError(f"{about} is damaged ({error}): fetch it anew") from error
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
    if settings.teacher in NAMED:
        return
    member, place = families.locate(settings.teacher)
    if "://" not in place and not Path(place).is_file():
        if member:
            raise FileNotFoundError(f"no file {place}, which --teacher names for {member.name}")
        alike = difflib.get_close_matches(settings.teacher, families.MEMBERS)
        raise FileNotFoundError(
            f"no checkpoint at {place}, and no family has one of that name "
            + (f"(is it {' or '.join(alike)}?)" if alike else "(python teachers.py lists them)")
        )


def pretrained(settings: Settings, dataset: data.Data) -> Path:
    """The model.pt of a teacher for these settings and images, pre-trained now if need be."""
    net = {name: getattr(settings, name) for name in ("model", "patch", "components")}
    return make("pretrain", pretrain, settings, dataset, num_labels=0, subset_seed=-1, **net)


def make(name: str, script, settings: Settings, dataset: data.Data, **changes) -> Path:
    """The model.pt of a script's own recipe on these images, trained now if need be.

    One that was made otherwise is left alone: the new one goes to a folder beside it.
    """
    shared = (*IMAGES, "seed", "device", "amp", "compile", "save_every")
    own = script.parse(["--data", settings.data])
    own = own.but(**{k: v for k, v in vars(settings).items() if k in shared}).but(**changes)
    wanted = what_counts(runs.identity(name, dataset, None, own))
    out = runs.folder(own, name)
    found = runs.what_is_in(out)
    if found is not None and (odd := runs.differences(what_counts(found), wanted)):
        how = f"made otherwise ({'; '.join(odd[:3])})" if found else "of unknown origin"
        print0(f"The teacher in {out} is {how}; to use it, name its model.pt by --teacher.")
        out = out.with_name(f"{out.name}-{runs.digest(wanted)}")
        found = runs.what_is_in(out)
    if settings.out and Path(settings.out).resolve() == out.resolve():
        raise ValueError(f"--out {out} is where the teacher lies, or will: choose another")
    if found and (out / "model.pt").is_file():
        return out / "model.pt"
    if found:
        print0(f"The teacher in {out} is not finished: going on with it first.")
        own = own.but(amp=found["amp"], resume=True)
    else:
        print0(f"No teacher in {out} yet: making one first.")
    own = own.but(out=str(out))
    try:
        train.fit(script.task(own), own)
    except ValueError as error:
        advice = "if no other process trains there, remove that folder"
        raise ValueError(f"the teacher in {out}: {error}; {advice}") from error
    print0("The teacher is ready. Now the student:")
    return out / "model.pt"


def what_counts(run: dict) -> dict:
    """Of a run's identity, what decides whether its net is the teacher wanted.

    Not how sums are rounded, what it was tested on, or its own teacher, which --teacher names.
    """
    others = "amp images_per_step one_tensor tested_on teacher_weights normalization".split()
    return {k: v for k, v in run.items() if k not in others}


def teacher_and_student(settings: Settings, dataset: data.Data | None = None):
    """A frozen lender of maps, a random student, layers to transfer, images normalised for both.

    And the checkpoint of the teacher (None for a random one). `dataset`: used instead of what the
    settings name. What can be wrong without knowing the teacher is found before it is made or
    fetched.
    """
    if settings.teacher == "none":
        raise ValueError(
            "--teacher none: there is nothing to transfer without a teacher "
            "(finetune.py trains from scratch)"
        )
    device = launch.device(settings.device)
    check(settings)
    layers = parse_layers(settings.layers, families.size(settings.model)[1])
    dataset = dataset or data.load(settings, device)
    sizes = families.sizes(settings, dataset)
    sizes.check()
    checkpoint, teacher = None, None
    if settings.teacher != "random":
        checkpoint = find(settings, dataset)
        teacher = checkpoints.load(checkpoint, image_size=dataset.image_size, classes=0)
        dataset.adopt(checkpoint)
        check_components(settings, teacher.config)
    torch.manual_seed(settings.seed)
    config = student_of(teacher.config if teacher else sizes, sizes, settings.student)
    student = vit.ViT(config, settings.drop_path)
    teacher = teacher or vit.ViT(sizes)
    teacher.to(device).eval().requires_grad_(False)
    theirs = ()
    if settings.teacher_layers:
        theirs = parse_layers(settings.teacher_layers, teacher.config.depth, "teacher-layers")
    whose = lender(teacher, student, layers, theirs, settings.heads)
    if isinstance(whose, Lender) and whose.registers:
        print0("note: the maps are cut to the tokens of both, less the teacher's registers")
    if settings.drop_path and settings.share_drops and teacher.config.depth != config.depth:
        print0("note: the student drops paths alone: its teacher has another depth")
    return whose, student.to(device), layers, dataset, checkpoint


def check_components(settings: Settings, theirs: vit.Config) -> None:
    """ValueError if --components asks for others than a teacher's, which are its student's too."""
    asked = families.components(settings.components)
    if any(getattr(theirs, name) != value for name, value in asked.items()):
        raise ValueError(
            f"--components {settings.components}: this teacher has its own, and its student "
            "the same, or none (--student plain)"
        )


def student_of(teacher: vit.Config, sizes: vit.Config, kind: str = "") -> vit.Config:
    """A student of these sizes with the components of its teacher, which begin at random.

    Without them ("plain") some families teach nothing (arXiv 2605.07191); a class token it has
    where its teacher has one.
    """
    plain = {name: getattr(vit.Config, name) for name in families.COMPONENTS}
    theirs = {name: getattr(teacher, name) for name in families.COMPONENTS}
    if kind == "plain":
        return replace(sizes, **plain | {"class_token": teacher.class_token})
    return replace(sizes, **theirs)


# What there is -----------------------------------------------------------------------------------

SETTINGS = {"name": Setting("", "only those that have this in their names")}
parse = partial(parse_settings, __doc__, SETTINGS)


def listed(family: families.Family, word: str) -> list[str]:
    """What is to be known of a family, and its members with `word` in their names, as lines."""
    found = [member for member in families.members(family) if word in member.name]
    if not found:
        return []
    mean, deviation = (" ".join(f"{x:g}" for x in part) for part in family.normalization)
    hosts = {member.url.split("/")[2] if member.url else "pytorch.org" for member in found}
    about = {
        "licence": family.licence,
        "code": family.source,
        "files": ", ".join(sorted(hosts)),
        "pixels": f"mean {mean}, deviation {deviation}",
    }
    lines = [f"{family.title}: adds {family.adds}"]
    lines += [f"  {what:<8} {text}" for what, text in about.items()]
    for name, _, dim, depth, heads, patch, size, _ in found:
        lines.append(f"  {name:<43} {dim:>4} x {depth}, {heads:>2} heads, patch {patch:>2}, {size}")
    return [*lines, ""]


def main(settings: Settings) -> None:
    lines = [line for family in families.FAMILIES for line in listed(family, settings.name)]
    if not lines:
        raise ValueError(f"--name {settings.name}: no teacher has this in its name")
    print("name, width x depth, heads, patch, and the side of its images in pixels\n")
    print("\n".join(lines), end="")


if __name__ == "__main__":
    launch.run(main, parse)
