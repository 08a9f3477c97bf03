"""A teacher for a student that is not quite like it: other layers, heads or tokens are matched.

Where both are alike a teacher lends by itself (vit.ViT.queries_keys). A Lender has the same method,
so callers need not know which of the two they have.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention import Attended, attention_scores, lend_map
from vit import Config, ViT

TEMPERATURE = 10.0  # of heads taken together, in the scripts of AttnDistill


@dataclass(frozen=True)
class Lender:
    """What `teacher` attends with, as a student can take it."""

    teacher: ViT
    layers: dict[int, int]  # student layer -> teacher layer, both ascending
    heads: Sequence[int] = ()  # teacher head for each student head (empty: same order)
    together: int = 0  # number of student heads that share one merged map (0: no merging)
    registers: int = 0  # of the teacher, which the student lacks

    def queries_keys(
        self, images: Tensor, layers: Collection[int], drop_path_mask: Tensor | None = None
    ) -> Iterator[Attended | None]:
        """Of each block of the student what is lent to it; as vit.ViT.queries_keys."""
        if drop_path_mask is not None and len(drop_path_mask) != len(self.teacher.blocks):
            drop_path_mask = None  # of a student of another depth: nothing is dropped
        theirs = [self.layers[i] for i in sorted(layers)]
        lent = self.teacher.queries_keys(images, theirs, drop_path_mask)
        attended = (some for some in lent if some is not None)
        for i in range(max(layers) + 1):
            yield self.matched(next(attended)) if i in layers else None

    def matched(self, attended: Attended) -> Attended:
        q, k, _, bias = attended
        if self.registers:  # the softmax over the other tokens is the map, cut and renormalised
            q, k = self.cut(q, 2), self.cut(k, 2)
            bias = None if bias is None else self.cut(self.cut(bias, 2), 3)
        if self.heads:
            q, k = self.pick(q), self.pick(k)
            bias = bias if bias is None or bias.shape[1] == 1 else self.pick(bias)
        lent = Attended(q, k, bias=bias)
        return as_one(lent, self.together) if self.together else lent

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """Without the registers, which stand between the class token and the patches."""
        first = int(self.teacher.config.class_token)
        patches = x.shape[dim] - first - self.registers
        return torch.cat([x.narrow(dim, 0, first), x.narrow(dim, -patches, patches)], dim)

    def pick(self, x: Tensor) -> Tensor:  # by slices: indices would have to travel to the GPU
        return torch.cat([x[:, i : i + 1] for i in self.heads], dim=1)


def as_one(attended: Attended, heads: int) -> Attended:
    """All heads taken together, for each of `heads`."""
    scores = attention_scores(attended)
    precise = torch.promote_types(scores.dtype, torch.float32)  # a divergence is a small difference
    log_p = scores.log_softmax(dim=-1, dtype=precise)
    return lend_map(aggregated(log_p).expand(-1, heads, -1, -1))


def aggregated(log_p: Tensor) -> Tensor:
    """All heads as one, from the logs of their maps: (B, H, ..., N) to (B, 1, ..., N).

    softmax(sum over heads of log p / 10): AttnDistill's (Wang et al., BMVC 2022, section 3).
    """
    return (log_p.sum(dim=1, keepdim=True) / TEMPERATURE).softmax(dim=-1)


def described(teacher: ViT | Lender) -> tuple[ViT, tuple[tuple[int, ...], str]]:
    """The teacher itself; and the last two arguments that `lender` needs to make it a lender."""
    if isinstance(teacher, ViT):
        return teacher, ((), "")
    picked = ",".join(f"{i}-{i}" for i in teacher.heads)  # "2" would be the first two
    heads = "together" if teacher.together else picked
    return teacher.teacher, (tuple(teacher.layers.values()), heads)


def lender(
    teacher: ViT,
    student: ViT,
    layers: Sequence[int],
    teacher_layers: Sequence[int] = (),
    heads: str = "",
) -> ViT | Lender:
    """Who lends the maps of a teacher to a student: the teacher itself, where they are alike.

    `layers`: of the student; `teacher_layers`: whose maps they take (none: of the same number).
    `heads`: which of the teacher's (as parse_layers reads it; none: all), or "together":
    AttnDistill's one map for all, softmax(sum of log maps / 10) (Wang et al., BMVC 2022, section
    3). Widths may differ.
    ValueError, in words that name the flags, where a map of one cannot be one of the other's.
    """
    theirs, ours = teacher.config, student.config
    sources = list(teacher_layers or layers)
    if sources != sorted(set(sources)):
        raise ValueError(f"--teacher-layers {sources}: name each once, from the first to the last")
    if len(sources) != len(layers):
        raise ValueError(
            f"--teacher-layers names {len(sources)} layers and --layers {len(layers)}: each of the "
            "student's takes one of the teacher's"
        )
    if sources[-1] >= theirs.depth:
        raise ValueError(
            f"--layers goes up to layer {sources[-1]}, but the teacher has {theirs.depth} layers "
            f"(0 to {theirs.depth - 1}): name others, or --teacher-layers"
        )
    picked = () if heads in ("", "together") else parse_layers(heads, theirs.heads, "heads")
    together = ours.heads if heads == "together" else 0
    lent = counts(theirs) | {"heads": together or len(picked) or theirs.heads}
    cut = theirs.registers if not ours.registers else 0
    lent["tokens"] -= cut
    for what, count in counts(ours).items():
        if lent[what] != count:
            raise ValueError(
                f"the teacher has {lent[what]} {what} and the student {count}: choose --model, "
                "--patch, --data, --teacher or --heads so that they agree"
            )
    if theirs.depth == ours.depth and not (cut or picked or together) and sources == list(layers):
        return teacher
    return Lender(teacher, dict(zip(layers, sources, strict=True)), picked, together, cut)


def counts(config: Config) -> dict[str, int]:
    """What must be equal for a map of one ViT to be one of another's, on the same images."""
    counted = {"heads": config.heads, "tokens": config.tokens, "channels": config.channels}
    return counted | {"class tokens": int(config.class_token)}


def parse_layers(text: str, depth: int, what: str = "layers") -> list[int]:
    """Block numbers: '18' or '75%' (the first), '6-11' or '0,2,4-7' (counted from 0), or 'all'."""
    try:
        if not re.fullmatch(r"all|[0-9.]+%|[0-9,-]+", text):
            raise ValueError("no numbers")
        if text == "all":
            spans = [(0, depth - 1)]
        elif text.endswith("%"):
            share = float(text[:-1]) / 100
            spans = [(0, max(share > 0, int(depth * share)) - 1)]
        elif text.isdigit():
            spans = [(0, int(text) - 1)]
        else:
            parts = [part.split("-", 1) for part in text.split(",")]
            spans = [(int(part[0]), int(part[-1])) for part in parts]
    except (ValueError, OverflowError):
        raise ValueError(
            f"--{what} {text}: write a count (18) or share (75%) of the first, a range (6-11), a "
            "list (0,2,4-7) or 'all'"
        ) from None
    if not all(0 <= first <= last < depth for first, last in spans):
        raise ValueError(
            f"--{what} {text}: choose at least one of this model's {depth} {what} "
            f"(0 to {depth - 1})"
        )
    found = [i for first, last in spans for i in range(first, last + 1)]
    if found != sorted(set(found)):
        raise ValueError(f"--{what} {text}: name each once, from the first to the last")
    return found
