"""Adapts a teacher's attention to a student with another depth, head count or token count."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import vit
from common.launch import print0
from common.settings import parse_layers
from teachers.load import build, build_vit, make_config

SIZE = {"dim": "model", "depth": "model", "heads": "model", "patch": "patch"}  # field: flag


@dataclass(frozen=True)
class TeacherAdapter:
    """What `teacher` attends with, in the form a student takes."""

    teacher: vit.ViT
    depth: int  # of the student
    layers: dict[int, int]  # student layer -> teacher layer, both ascending
    heads: Sequence[int] = ()  # teacher head for each student head (empty: same order)
    registers: int = 0  # of the teacher, which the student lacks

    def lend(self, images: Tensor, layers: Collection[int], keep=None) -> Iterator[vit.QK | None]:
        """As ViT.lend, for each block of the student. A teacher of another depth drops no paths."""
        keep = keep if len(self.teacher.blocks) == self.depth else None
        theirs = [self.layers[i] for i in sorted(layers)]
        lent = (qk for qk in self.teacher.lend(images, theirs, keep) if qk is not None)
        for i in range(self.depth):
            yield self.match(next(lent)) if i in layers else None

    def match(self, qk: vit.QK) -> vit.QK:
        q, k, bias = qk  # with registers there is no bias
        end = self.teacher.config.num_prefix_tokens  # of the registers
        first = slice(0, end - self.registers)
        if self.registers:  # the softmax over the other tokens: the map, cut and renormalised
            q, k = (torch.cat([x[:, :, first], x[:, :, end:]], dim=2) for x in (q, k))
        if not self.heads:
            return vit.QK(q, k, bias)
        parts = (q, k) if bias is None else (q, k, bias)  # slices: indices would travel to the GPU
        return vit.QK(*(torch.cat([x[:, i : i + 1] for i in self.heads], dim=1) for x in parts))

    @property
    def adapted(self) -> dict[str, list[int]]:  # what `adapt` needs to make it again
        return {"teacher_layers": list(self.layers.values()), "heads": list(self.heads)}


Teacher = vit.ViT | TeacherAdapter  # both lend


def adapt(teacher: vit.ViT, student: vit.ViT, layers, teacher_layers=(), heads=()):
    """Who lends a teacher's maps to a student: the teacher itself, or a TeacherAdapter.

    `layers` of the student take the maps of `teacher_layers` (none: of the same numbers). `heads`:
    which of the teacher's (none: all). ValueError where a map of one cannot be one of the other's.
    """
    theirs, ours, sources = teacher.config, student.config, list(teacher_layers or layers)
    if len(sources) != len(layers) or sources[-1] >= theirs.depth:
        remedy = f"choose as many --teacher-layers, from 0 to {theirs.depth - 1}"
        raise ValueError(f"--layers {list(layers)} cannot take the maps of {sources}: {remedy}")
    heads = () if list(heads) == list(range(theirs.heads)) else tuple(heads)
    registers = 0 if getattr(ours, "registers", 0) else getattr(theirs, "registers", 0)
    tokens = [config.num_prefix_tokens + config.grid_size**2 for config in (theirs, ours)]
    lent = {"heads": len(heads) or theirs.heads, "tokens": tokens[0] - registers}
    taken = {"heads": ours.heads, "tokens": tokens[1]}
    if lent != taken:
        remedy = "choose --model, --patch, --teacher or --heads so that they agree"
        raise ValueError(f"the teacher's maps have {lent} and the student's {taken}: {remedy}")
    if theirs.depth == ours.depth and sources == list(layers) and not (registers or heads):
        return teacher
    pairs = dict(zip(layers, sources, strict=True))
    return TeacherAdapter(teacher, ours.depth, pairs, heads, registers)


def make_pair(settings, dataset, checkpoint) -> tuple[Teacher, vit.ViT, list[int]]:
    """A frozen teacher (random without a checkpoint), a random student, and its layers to teach."""
    if settings.teacher == "none":
        raise ValueError("--teacher none: no teacher, no maps (finetune.py can do without)")
    config = make_config(settings, dataset)
    if checkpoint:
        teacher = build_vit(checkpoint, image_size=dataset.image_size, classes=0)
        config = make_student_config(settings, config, teacher.config)
    torch.manual_seed(settings.seed)
    student = build(config, settings.drop_path, settings.positions)
    teacher = teacher if checkpoint else build(config, positions=settings.positions)
    layers, sources = parse_layers(settings.layers, config.depth), settings.teacher_layers
    sources = parse_layers(sources, teacher.config.depth, "teacher_layers") if sources else ()
    heads = parse_layers(settings.heads or "all", teacher.config.heads, "heads")
    teacher.to(device := dataset.train.device).eval().requires_grad_(False)
    return adapt(teacher, student, layers, sources, heads), student.to(device), layers


def make_student_config(settings, asked: vit.Config, teacher: vit.Config) -> vit.Config:
    """The teacher's, but for the size where --model or --patch is given."""
    changes = {name: getattr(asked, name) for name in SIZE if SIZE[name] in settings.given}
    config = replace(teacher, classes=asked.classes, **changes)
    if (
        "=" in settings.model
        and replace(asked, patch=config.patch, mean=config.mean, std=config.std) != config
    ):
        raise ValueError(f"--model {settings.model}: this teacher has other components")
    sizes = [", ".join(f"{name} {getattr(one, name)}" for name in SIZE) for one in (config, asked)]
    if sizes[0] != sizes[1]:
        print0(f"note: the student has its teacher's size: {sizes[0]} (--model, --patch change it)")
    return config
