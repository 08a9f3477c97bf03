"""Attention transfer with one thing changed, and the baselines beside it.

    python -m study.variants --maps mean               copy; one map for all
    python -m study.variants --start teacher           copy, and weights too
    python -m study.variants --how features            another target
    python -m study.variants --how probe               only a head is trained

--maps other are the teacher's maps of other images, mean their mean. With
impulse each head looks at one neighbour. Rows of the study: study/rows.py.
Without a change, copy and distill are attention_copy.py, attention_distill.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import attention_copy
import attention_distill
import data
import finetune
import recipes
import students
import train
from common import checkpoints, launch
from common.settings import parse_settings, setting
from teachers.adapt import make_pair
from vit import QK, ViT, attend

HOW = "copy", "distill", "features", "probe"
MAPS = "teacher", "other", "mean", "uniform", "impulse"


@dataclass(frozen=True)
class Settings(recipes.TransferSettings):
    how: str = setting("copy", "how: " + ", ".join(HOW), HOW)
    maps: str = setting("teacher", "maps to copy or distill: " + ", ".join(MAPS), MAPS)
    lend: str = setting("qk", "which of q, k, v are copied", ("qk", "q", "k", "v", "qkv"))
    start: str = setting("random", "the student's first weights", ("random", "teacher"))
    attention_weight: float = setting(3.0, "weight of the loss of distill and features")
    bank: int = setting(512, "training images that other and mean maps are of", low=2)

    @property
    def method(self) -> str:
        return self.how


USUAL = {"maps": "teacher", "lend": "qk"}
USES = {"copy": {"maps", "lend"}, "distill": {"maps"}}
parse = partial(parse_settings, __doc__, Settings, attention_distill.RECIPES)


# Whose maps: lenders, as a ViT is one -------------------------------------------------------------


@dataclass(frozen=True)
class FixedMaps:  # lends the same maps for every image
    maps: list[Tensor]  # of each block: (1, H, N, N)

    def lend(self, images: Tensor, layers, keep=None) -> Iterator[QK | None]:
        for i, p in enumerate(self.maps):
            yield QK.from_map(p.expand(len(images), -1, -1, -1)) if i in layers else None


@dataclass(frozen=True)
class OtherImages:
    """Lends a teacher's maps of images in `bank`: at random, in evaluation always the same."""

    teacher: ViT
    bank: Tensor

    def lend(self, images: Tensor, layers, keep=None) -> Iterator[QK | None]:
        chosen = torch.arange(len(images)) % len(self.bank)
        if torch.is_grad_enabled():
            chosen = torch.randint(len(self.bank), (len(images),))
        return self.teacher.lend(self.bank[chosen], layers, keep)


@torch.no_grad()
def average_maps(teacher: ViT, images: Tensor) -> list[Tensor]:
    """For each block the mean of its maps over images: (1, H, N, N)."""
    sums = [0.0] * len(teacher.blocks)
    for some in images.split(64):
        for i, (_, qk) in enumerate(teacher.blockwise(some)):
            sums[i] = sums[i] + qk.map().sum(dim=0, keepdim=True)
    return [total / len(images) for total in sums]


def make_uniform_map(teacher: ViT) -> Tensor:
    """Every query attends to all tokens equally: (1, H, N, N)."""
    tokens = teacher.config.num_prefix_tokens + teacher.config.grid_size**2
    shape, device = (1, teacher.config.heads, tokens, tokens), teacher.fc_norm.weight.device
    return torch.full(shape, 1 / tokens, device=device)


def draw_impulse_map(teacher: ViT) -> Tensor:
    """Each head looks at one neighbour of a patch, in the same direction for all: (1, H, N, N).

    The maps that a structured initialisation begins with (arXiv 2505.19985), here without noise.
    """
    grid, first = teacher.config.grid_size, teacher.config.num_prefix_tokens
    p = 0.1 * make_uniform_map(teacher)
    p[:, :, :first] *= 10  # tokens that are no patches have no neighbours
    line, patches = torch.arange(grid), torch.arange(first, p.shape[-1])
    for head in range(teacher.config.heads):
        down, right = torch.randint(-1, 2, (2,)).tolist()
        rows, columns = ((line + step).clamp(0, grid - 1) for step in (down, right))
        p[:, head, patches, first + (rows[:, None] * grid + columns).flatten()] += 0.9
    return p


def choose_lender(teacher: ViT, dataset: data.Data, settings: Settings):
    if settings.maps == "teacher":
        return teacher
    if settings.maps in ("other", "mean"):
        bank, _ = dataset.train.first(settings.bank)
        if settings.maps == "other":
            return OtherImages(teacher, bank)
        return FixedMaps(average_maps(teacher, bank))
    if settings.maps == "uniform":
        return FixedMaps([make_uniform_map(teacher)] * len(teacher.blocks))
    torch.manual_seed(settings.seed)
    return FixedMaps([draw_impulse_map(teacher) for _ in teacher.blocks])


# What is done with them ---------------------------------------------------------------------------


def predict_with_parts(student: ViT, images: Tensor, teacher: ViT, layers, parts: str) -> Tensor:
    """As attention_copy.predict, but `parts` of q, k and v are the teacher's."""
    keep = student.draw_drop_path(len(images))
    x, y = student.embed(images), teacher.embed(images)
    for i, (ours, theirs) in enumerate(zip(student.blocks, teacher.blocks, strict=True)):
        if i in layers:
            own, lent = ours.attn.project(ours.norm1(x)), theirs.attn.project(theirs.norm1(y))
            pairs = zip("qkv", own, lent, strict=True)
            q, k, v = (b if part in parts else a for part, a, b in pairs)
            seen = rearrange(attend(QK(q, k), v), "b h n d -> b n (h d)")
            x = x + keep[i][0] * ours.attn.proj(seen)
            x = x + keep[i][1] * ours.mlp(ours.norm2(x))
        else:
            x, _ = ours(x, None, keep[i])
        y, _ = theirs(y, None, keep[i])
    return student.classify(x)


def loss_copy(student: ViT, images, labels, predict: Callable, smoothing: float):
    return F.cross_entropy(predict(student, images), labels, label_smoothing=smoothing), {}


def loss_features(student: ViT, images, labels, teacher: ViT, layers, settings: Settings):
    """The tokens after each of `layers`, normalised, are pulled to the teacher's."""
    features = 0.0
    both = zip(student.blockwise(images), teacher.blockwise(images), strict=True)
    for i, ((x, _), (theirs, _)) in enumerate(both):
        if i in layers:
            ours, theirs = (F.layer_norm(tokens, x.shape[-1:]) for tokens in (x, theirs))
            features = features + F.mse_loss(ours, theirs)
    classes = F.cross_entropy(student.classify(x), labels, label_smoothing=settings.smoothing)
    total = classes + settings.attention_weight * features
    return total, {"class": classes, "features": features}


def loss_probe(net: ViT, images, labels, smoothing: float):
    with torch.no_grad():
        x = net.forward_features(images)
    return F.cross_entropy(net.classify(x), labels, label_smoothing=smoothing), {}


# Tasks --------------------------------------------------------------------------------------------


def task(settings: Settings, dataset: data.Data, checkpoint=None) -> train.Task:
    check(settings)
    if settings.how == "probe":
        return make_probe(settings, dataset, checkpoint)
    teacher, student, layers = make_pair(settings, dataset, checkpoint)
    if settings.start == "teacher":
        if not checkpoint:
            raise ValueError("--start teacher: name a --teacher with weights")
        student = finetune.task(settings, dataset, checkpoint).net
    unchanged = (settings.maps, settings.lend) == ("teacher", "qk")
    if type(teacher) is not ViT and not (unchanged and settings.how in USES):
        raise ValueError("name a plain ViT as --teacher, with the layers and heads of --model")
    how = dict(teacher=choose_lender(teacher, dataset, settings), layers=layers)
    predict, export = ViT.__call__, checkpoints.export
    if settings.how == "copy":
        parts = partial(predict_with_parts, parts=settings.lend)
        predict = partial(attention_copy.predict if settings.lend == "qk" else parts, **how)
        loss = partial(loss_copy, predict=predict, smoothing=settings.smoothing)
        export = partial(checkpoints.export, **how) if unchanged else export_changed
    else:
        loss = attention_distill.loss if settings.how == "distill" else loss_features
        loss = partial(loss, **how, settings=settings)
    return train.Task(student, dataset, loss, predict, export, checkpoint)


def check(settings: Settings) -> None:
    """ValueError for a change that would silently have no effect."""
    changed = {name for name in ("maps", "lend") if getattr(settings, name) != USUAL[name]}
    if settings.how == "probe":
        changed |= settings.given & {"layers", "teacher_layers", "heads", "start"}
    if not changed <= USES.get(settings.how, set()) or len(changed) > 1:
        raise ValueError(f"--how {settings.how} does not go with --{' --'.join(sorted(changed))}")


def make_probe(settings: Settings, dataset: data.Data, checkpoint) -> train.Task:
    """The teacher as it is. Only a head, and the norm before it, are trained."""
    probe = finetune.task(settings, dataset, checkpoint)
    probe.net.requires_grad_(False)
    for part in (probe.net.fc_norm, probe.net.head):
        part.requires_grad_(True)
    probe.loss = partial(loss_probe, smoothing=settings.smoothing)
    return probe


def export_changed(student: ViT) -> dict:  # no one takes it for a ViT: it needs what was lent
    return {"student": student.state_dict()}


main = partial(students.main, task)


if __name__ == "__main__":
    launch.run(main, parse)
