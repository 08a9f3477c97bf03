"""Adapts a teacher's attention to a student with another depth, head count or token count."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import vit


@dataclass(frozen=True)
class TeacherAdapter:
    """What `teacher` attends with, in the form a student takes."""

    teacher: vit.ViT
    depth: int  # of the student
    layers: dict[int, int]  # student layer -> teacher layer, both ascending
    heads: Sequence[int] = ()  # teacher head for each student head (empty: same order)
    registers: int = 0  # of the teacher, which the student lacks

    def lend(self, images: Tensor, layers, factors=None) -> Iterator[vit.QK | None]:
        """As ViT.lend, for each block of the student. A teacher of another depth drops no paths."""
        factors = factors if len(self.teacher.blocks) == self.depth else None
        theirs = [self.layers[i] for i in sorted(layers)]
        lent = (qk for qk in self.teacher.lend(images, theirs, factors) if qk is not None)
        for i in range(self.depth):
            yield self.match(next(lent)) if i in layers else None

    def match(self, qk: vit.QK) -> vit.QK:
        q, k, bias = qk
        assert bias is None, "a bias would have to be cut, too"
        end = self.teacher.config.num_prefix_tokens  # of the registers
        first = slice(0, end - self.registers)
        if self.registers:  # the softmax over the other tokens: the map, cut and renormalised
            q, k = (torch.cat([x[:, :, first], x[:, :, end:]], dim=2) for x in (q, k))
        if self.heads:  # as slices: indices would travel to the GPU
            q, k = (torch.cat([x[:, i : i + 1] for i in self.heads], dim=1) for x in (q, k))
        return vit.QK(q, k)

    @property
    def adapted(self) -> dict[str, list[int]]:  # what `adapt` needs to make it again
        return {"teacher_layers": list(self.layers.values()), "heads": list(self.heads)}


Teacher = vit.ViT | TeacherAdapter  # both lend


def adapt(teacher: vit.ViT, student: vit.ViT, layers, teacher_layers=(), heads=()) -> Teacher:
    """Who lends a teacher's maps to a student: the teacher itself, or a TeacherAdapter.

    `layers` of the student take the maps of `teacher_layers` (none: of the same numbers). `heads`:
    which of the teacher's (none: all). ValueError if layers, heads or tokens do not match.
    """
    theirs, ours, sources = teacher.config, student.config, list(teacher_layers or layers)
    if len(sources) != len(layers) or sources[-1] >= theirs.depth:
        remedy = f"choose as many --teacher-layers, from 0 to {theirs.depth - 1}"
        raise ValueError(f"--layers {list(layers)} cannot take the maps of {sources}: {remedy}")
    heads = () if list(heads) == list(range(theirs.heads)) else tuple(heads)
    registers = 0 if getattr(ours, "registers", 0) else getattr(theirs, "registers", 0)
    tokens = theirs.num_prefix_tokens + theirs.grid_size**2 - registers
    lent = {"heads": len(heads) or theirs.heads, "tokens": tokens}
    taken = {"heads": ours.heads, "tokens": ours.num_prefix_tokens + ours.grid_size**2}
    if lent != taken:
        remedy = "choose --model, --patch, --teacher or --heads so that they agree"
        raise ValueError(f"the teacher's maps have {lent} and the student's {taken}: {remedy}")
    if theirs.depth == ours.depth and sources == list(layers) and not (registers or heads):
        return teacher
    pairs = dict(zip(layers, sources, strict=True))
    return TeacherAdapter(teacher, ours.depth, pairs, heads, registers)
