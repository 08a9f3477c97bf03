"""AttnDistill: a small ViT learns, without labels, what a class token is and where it looks.

Wang, Yang and van de Weijer, BMVC 2022 (arXiv 2210.00944). Only the last block,
and only the row of its maps that belongs to the class token:

    loss = MSE(P(class token of the student), class token of the teacher)
           + weight * KL(row of the teacher | row of the student)

P is a small MLP. Where the teacher has smaller patches, its row is made that of
the student's by interpolation; where it has other heads, those of each are
taken together: softmax(sum over heads of log a / 10).

    python -m related.attndistill                  makes a teacher by DINO first
    python -m related.attndistill --attention-weight 0 --out runs/no     control
    python -m related.attndistill --heads 2            other heads than its teacher
    python -m related.attndistill --patch 4            other patches
"""

import launch

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import checkpoints
import data
import families
import runs
import teachers
import train
from attention import Attended, attention_map
from related import dino
from settings import IMAGES, Setting, Settings, change, parse_settings
from vit import ViT

SETTINGS = change(
    {k: v for k, v in dino.SETTINGS.items() if k not in dino.OWN},
    #             digits cifar
    epochs=       (100,  200),
    warmup=       (10,   10),
    lr=           (2e-3, 1e-3),
    model=        ("nano", "mini"),
) | {
    "teacher": Setting("auto", "a ViT whose class token means something (auto: DINO's)", free=True),
    "heads": Setting(0, "of the student (0: as --model has them)"),
    "attention_weight": Setting(0.1, "of the row of the class token (0: none)"),
}  # fmt: skip
parse = partial(parse_settings, __doc__, SETTINGS)
TEMPERATURE = 10.0  # of heads taken together


class Student(nn.Module):
    """A ViT, and the MLP that makes its class token comparable with the teacher's."""

    def __init__(self, vit: ViT, dim: int):
        super().__init__()
        self.vit, widths = vit, (vit.config.dim, 2 * dim, dim, 2 * dim)
        layers: list[nn.Module] = [nn.LayerNorm(vit.config.dim)]
        for into, out in pairwise(widths):
            layers += [nn.Linear(into, out), nn.GELU()]
        self.project = nn.Sequential(*layers, nn.Linear(widths[-1], dim), nn.LayerNorm(dim))

    @property
    def architecture(self) -> dict:
        return self.vit.architecture


def last(vit: ViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """The class token (B, D), and where it looks in the last block (B, H, 1 + patches)."""
    for x, used in vit.run(images):
        pass
    rows = attention_map(Attended(used.q[:, :, :1], used.k))[:, :, 0]
    kept = [rows[..., :1], rows[..., vit.config.prefix :]]  # registers are no places
    return vit.fc_norm(x)[:, 0], torch.cat(kept, dim=-1)


def interpolated(row: Tensor, patches: int) -> Tensor:
    """Rows (B, H, 1 + n^2) for another number of patches; that of the class token stays."""
    if row.shape[-1] == 1 + patches:
        return row
    first, rest = row[..., :1], row[..., 1:]
    grid = rearrange(rest, "b h (y x) -> b h y x", y=math.isqrt(rest.shape[-1]))
    side = math.isqrt(patches)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic").flatten(2).clamp_min(0)
    return torch.cat([first, grid * (1 - first) / grid.sum(dim=-1, keepdim=True)], dim=-1)


def together(row: Tensor) -> Tensor:
    """All heads as one: (B, H, N) to (B, 1, N)."""
    return (row.clamp_min(1e-9).log().sum(dim=1, keepdim=True) / TEMPERATURE).softmax(dim=-1)


def row_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL divergence of the teacher's rows from the student's, summed over heads, mean of images."""
    theirs = interpolated(theirs, ours.shape[-1] - 1)
    if ours.shape[1] != theirs.shape[1]:
        ours, theirs = together(ours), together(theirs)
    p, p_t = (F.normalize(row.clamp(1e-5, 0.996), p=1.0, dim=-1) for row in (ours, theirs))
    return F.kl_div(p.log(), p_t, reduction="batchmean")


def loss(net: Student, images: Tensor, labels, teacher: ViT, weight: float):
    with torch.no_grad():
        token_t, row_t = last(teacher, images)
    token, row = last(net.vit, images)
    terms = {"token": F.mse_loss(net.project(token), token_t)}
    if weight:
        terms["attention"] = weight * row_loss(row, row_t)
    return terms, {}


def task(settings: Settings, images: data.Data | None = None) -> train.Task:
    """Everything that train.fit needs. `images`: others than those that the settings name."""
    device = launch.device(settings.device)
    images = images or data.load(settings, device)
    source = found(settings, images)
    teacher = checkpoints.load(source, image_size=images.image_size, classes=0)
    if not teacher.config.class_token:
        raise ValueError(f"--teacher {source.source}: has no class token")
    images.adopt(source)
    teacher.to(device).eval().requires_grad_(False)
    torch.manual_seed(settings.seed)
    sizes = families.sizes(settings, images)
    sizes = replace(sizes, classes=0, heads=settings.heads or sizes.heads)
    net = Student(ViT(sizes), teacher.config.dim).to(device)
    own_loss = partial(loss, teacher=teacher, weight=settings.attention_weight)
    return train.Task("attndistill", net, images, own_loss, None, export, teacher=source)


def found(settings: Settings, images: data.Data) -> checkpoints.Checkpoint:
    """The teacher that is named, or one made by DINO here first."""
    if settings.teacher != "auto":
        return teachers.by_name(settings.teacher)
    shared = {k: v for k, v in vars(settings).items() if k in SHARED}
    own = dino.parse(["--data", settings.data]).but(**shared)
    return checkpoints.read(teachers.made("dino", dino.task, own, images))


SHARED = {*IMAGES, "seed", "device", "amp", "compile", "save_every"}


def export(net: Student) -> dict:
    return checkpoints.export(net.vit)


def main(settings: Settings) -> dict:
    runs.check(settings, "attndistill")
    images = data.load(settings, launch.device(settings.device))
    made = task(settings, images)
    result = train.fit(made, settings)
    return result | dino.tested(made.net.vit, images, runs.folder(settings, "attndistill"))


if __name__ == "__main__":
    launch.run(main, parse)
