"""Attention transfer with one thing changed, and the baselines beside it.

    python -m study.variants --maps mean       copy; one map for all
    python -m study.variants --how beside      maps are predicted, not used
    python -m study.variants --how probe       only a head is trained
    python -m study.variants --how centre      its head reads one cell

--maps other are the teacher's maps of other images, mean their mean. With
impulse each head looks at one neighbour. Rows of the study: study/rows.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import attention_copy
import attention_distill
import data
import finetune
import recipes
import train
from common import checkpoints, launch
from common.settings import parse_settings, setting
from datasets.scenes import draw_squares
from pretrain import patchify
from study.lenders import choose_lender
from study.looks import jensen_shannon
from teachers.find import find_teacher, make_pair
from vit import QK, Config, ViT, attend, initialise

ALONE = "pixels", "probe", "centre"
HOW = "copy", "distill", "beside", "copy-beside", "features", *ALONE
MAPS = "teacher", "other", "mean", "uniform", "centre", "impulse", "tokens"
LENT = "qk", "q", "k", "v", "qkv"
LOSSES = "cross-entropy", "jensen-shannon", "squared", "scores"


@dataclass(frozen=True)
class Settings(recipes.TransferSettings):
    how: str = setting("copy", "how: " + ", ".join(HOW), HOW)
    maps: str = setting("teacher", "maps to copy or distill: " + ", ".join(MAPS), MAPS)
    lend: str = setting("qk", "what is copied: " + ", ".join(LENT), LENT)
    loss: str = setting("cross-entropy", "of maps: " + ", ".join(LOSSES), LOSSES)
    start: str = setting("random", "the student's first weights", ("random", "teacher"))
    class_weight: float = setting(1.0, "weight of the classification loss")
    attention_weight: float = setting(3.0, "weight of the other loss")
    bank: int = setting(512, "training images that other and mean maps are of", low=2)

    @property
    def method(self) -> str:
        return self.how


USUAL = {"maps": "teacher", "lend": "qk", "loss": LOSSES[0], "class_weight": 1.0}
MATCHED = {"maps", "loss", "class_weight"}
USES = {"copy": {"maps", "lend"}, "distill": MATCHED, "beside": MATCHED, "copy-beside": {"loss"},
        "pixels": {"attention_weight"}}  # fmt: skip
UNUSED = {"layers", "teacher_layers", "heads", "start", "bank", "attention_weight"}  # if ALONE
parse = partial(parse_settings, __doc__, Settings, attention_distill.RECIPES)


def predict_with_parts(student: ViT, images: Tensor, teacher: ViT, layers, parts: str) -> Tensor:
    """As attention_copy.predict, but `parts` of q, k and v are the teacher's."""
    factors = student.draw_drop_path(len(images))
    x, y = student.embed(images), teacher.embed(images)
    for i, (ours, theirs) in enumerate(zip(student.blocks, teacher.blocks, strict=True)):
        if i in layers:
            own, lent = ours.attn.project(ours.norm1(x)), theirs.attn.project(theirs.norm1(y))
            pairs = zip("qkv", own, lent, strict=True)
            q, k, v = (b if part in parts else a for part, a, b in pairs)
            seen = rearrange(attend(QK(q, k), v), "b h n d -> b n (h d)")
            x = x + factors[i][0] * ours.attn.proj(seen)
            x = x + factors[i][1] * ours.mlp(ours.norm2(x))
        else:
            x, _ = ours(x, None, factors[i])
        y, _ = theirs(y, None, factors[i])
    return student.classify(x)


def loss_labels(student: ViT, images, labels, predict: Callable, smoothing: float):
    return F.cross_entropy(predict(student, images), labels, label_smoothing=smoothing), {}


class Beside(nn.Linear):  # predicts queries and keys from the tokens that a block makes its own of
    def __init__(self, config: Config):
        super().__init__(config.dim, 2 * config.dim)
        self.heads = config.heads

    def forward(self, x: Tensor) -> QK:
        return QK(*rearrange(super().forward(x), "b n (p h d) -> p b h n d", p=2, h=self.heads))


def compare(ours, theirs, loss: str) -> Tensor:
    """How far a student's maps (or tokens) are from its teacher's: a mean over queries."""
    if isinstance(ours, Tensor):
        return F.mse_loss(ours, theirs)
    if loss == "cross-entropy":
        return attention_distill.compare_maps(ours, theirs)[0]
    if loss == "scores":  # softmax does not see what is added to all scores of a query
        s, t = (qk.scores() - qk.scores().mean(dim=-1, keepdim=True) for qk in (ours, theirs))
        return F.mse_loss(s, t)
    p, q = ours.map().clamp_min(1e-12), theirs.map()  # at 0 the gradient of p log p is infinite
    return ((p - q).square().sum(dim=-1) if loss == "squared" else jensen_shannon(p, q)).mean()


def loss_maps(student: ViT, images, labels, teacher, layers, settings: Settings):
    """As attention_distill.loss, but with another loss, target, or use of the student's tokens."""
    factors = student.draw_drop_path(len(images))
    x, maps = student.embed(images), 0.0
    lent = teacher.lend(images, layers, factors)
    for i, (block, theirs) in enumerate(zip(student.blocks, lent, strict=True)):
        before = x
        x, ours = block(x, theirs if settings.how == "copy-beside" else None, factors[i])
        if theirs is not None:
            if settings.how == "features":
                ours = F.layer_norm(x, x.shape[-1:])
            elif settings.how != "distill":
                ours = student.beside[str(i)](block.norm1(before))
            maps = maps + compare(ours, theirs, settings.loss)
    return add_losses(student.classify(x), labels, maps, settings)


def add_losses(logits: Tensor, labels: Tensor, other, settings: Settings):
    classes = F.cross_entropy(logits, labels, label_smoothing=settings.smoothing)
    total = settings.class_weight * classes + settings.attention_weight * other
    return total, {"class": classes, "other": other}


def loss_pixels(student: ViT, images, labels, settings: Settings):
    """Without a teacher, but with its task: the pixels of the cell that a pointer names."""
    x = student.forward_features(images)
    patch, grid = student.config.patch, student.config.grid_size
    cells = patchify(student.normalise(images), patch)  # as the teacher's task
    squares = patchify(draw_squares(grid, (images.shape[1], patch, patch)), patch)[:, 0]
    asked = (cells[:, len(squares) // 2] @ squares.to(images.device).T).argmax(dim=1)
    guess = student.beside(student.fc_norm(x[:, student.config.num_prefix_tokens :].mean(dim=1)))
    pixels = F.mse_loss(guess, cells[torch.arange(len(images)), asked])
    return add_losses(student.classify(x), labels, pixels, settings)


def predict_at_centre(net: ViT, images: Tensor) -> Tensor:
    """Logits from the token of the centre cell, which points, not from the mean of all cells."""
    centre = net.config.num_prefix_tokens + net.config.grid_size**2 // 2
    return net.head(net.fc_norm(net.forward_features(images)[:, centre]))


def task(settings: Settings, dataset: data.Data, checkpoint=None) -> train.Task:
    check(settings)
    if settings.how in ALONE:
        return make_alone(settings, dataset, checkpoint)
    teacher, student, layers = make_pair(settings, dataset, checkpoint)
    if settings.start == "teacher":
        if not checkpoint:
            raise ValueError("--start teacher: name a --teacher with weights")
        student = finetune.task(settings, dataset, checkpoint).net
    unchanged = (settings.maps, settings.lend) == ("teacher", "qk")
    if type(teacher) is not ViT and not (unchanged and settings.how in USES):
        raise ValueError("name a plain ViT as --teacher, with the layers and heads of --model")
    how = dict(teacher=choose_lender(teacher, dataset, settings), layers=layers)
    loss, predict, to_file = partial(loss_maps, **how, settings=settings), ViT.__call__, export
    if settings.how.startswith("copy"):
        parts = partial(predict_with_parts, parts=settings.lend)
        predict = partial(attention_copy.predict if settings.lend == "qk" else parts, **how)
        to_file = partial(export, **how) if unchanged else export_changed
    if settings.how == "copy":
        loss = partial(loss_labels, predict=predict, smoothing=settings.smoothing)
    elif settings.how.endswith("beside"):
        config, tokens = student.config, settings.maps == "tokens"
        sides = [nn.Linear(config.dim, config.dim) if tokens else Beside(config) for _ in layers]
        add_beside(student, nn.ModuleDict(zip(map(str, layers), sides, strict=True)))
    return train.Task(student, dataset, loss, predict, to_file, checkpoint)


def make_alone(settings: Settings, dataset: data.Data, checkpoint) -> train.Task:
    """Without a second net: a probe trains a head and its norm; pixels and centre the whole net."""
    alone = finetune.task(settings, dataset, checkpoint)
    net = alone.net
    if settings.how == "pixels":
        add_beside(net, nn.Linear(net.config.dim, net.config.channels * net.config.patch**2))
        alone.loss = partial(loss_pixels, settings=settings)
        alone.export = export
    elif settings.how == "centre":
        alone.predict, alone.export = predict_at_centre, export_changed
        alone.loss = partial(loss_labels, predict=predict_at_centre, smoothing=settings.smoothing)
    else:
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith(("fc_norm.", "head.")))
    return alone


def add_beside(student: ViT, module: nn.Module) -> None:
    """Trained with the student, used for nothing, and left out of model.pt by `export`."""
    student.beside = module.apply(initialise).to(student.fc_norm.weight.device)


def export(student: ViT, **lent) -> dict:
    found = checkpoints.export(student, **lent)
    kept = {name: w for name, w in found["model"].items() if not name.startswith("beside.")}
    return found | {"model": kept}


def check(settings: Settings) -> None:
    """ValueError for a change that would silently have no effect."""
    changed = {name for name, value in USUAL.items() if getattr(settings, name) != value}
    if settings.how in ALONE:
        changed |= settings.given & UNUSED
    wrong = changed - USES.get(settings.how, set())
    if {"maps", "lend"} <= changed or (settings.maps == "tokens" and settings.how != "beside"):
        wrong |= {"maps"}
    if wrong:
        raise ValueError(f"--how {settings.how} does not go with --{' --'.join(sorted(wrong))}")
    pointer = "scenes" in settings.data and settings.scene == "pointer" and settings.patch == 8
    if settings.how in ("pixels", "centre") and not pointer:
        raise ValueError(f"--how {settings.how}: only for scenes with a pointer, and --patch 8")


def export_changed(student: ViT) -> dict:  # no one takes it for a ViT: alone it is another net
    return {"student": student.state_dict()}


def main(settings: Settings) -> dict:
    dataset = data.load(settings)
    checkpoint = find_teacher(settings, dataset)
    return train.fit(task(settings, dataset, checkpoint), settings)


if __name__ == "__main__":
    launch.run(main, parse)
