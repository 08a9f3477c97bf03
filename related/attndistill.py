"""AttnDistill: a small ViT learns, without labels, what a class token is and where it looks.

Wang, Yang and van de Weijer, BMVC 2022 (arXiv 2210.00944). Only the last block,
and only the row of its maps that belongs to the class token:

    loss = MSE(P(class token of the student), class token of the teacher)
           + weight * KL(row of the teacher | row of the student)

P is a small MLP. Where the teacher has smaller patches, its row is made that of
the student's by interpolation; where it has other heads, those of each are
taken together: softmax(sum over heads of log a / 10).

    python -m related.attndistill                  makes a teacher by DINO first
    python -m related.attndistill --attention-weight 0 --out runs/token  control
    python -m related.attndistill --num-heads 2 --out runs/heads   other heads
    python -m related.attndistill --patch 4 --out runs/patches     other patches

A public teacher's class token is taken as its last block leaves it, normalised
without the weights of its last norm, which belong to its head.
"""

import launch

import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import checkpoints
import data
import runs
import teachers
import train
from attention import Attended, attention_map
from lending import aggregated
from related import dino
from settings import Setting, Settings, change, parse_settings
from vit import Config, ViT

SETTINGS = change(
    {k: v for k, v in dino.SETTINGS.items() if k not in dino.OWN},
    #             digits cifar
    model=        ("nano", "mini"),
) | {
    "teacher": Setting("auto", "a ViT whose class token means something (auto: DINO's)", free=True),
    "num_heads": Setting(0, "of the student (0: as --model has them)"),
    "attention_weight": Setting(0.1, "of the row of the class token (0: none)"),
}  # fmt: skip
parse = partial(parse_settings, __doc__, SETTINGS)


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
    def config(self) -> Config:
        return self.vit.config


def last(vit: ViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """The class token (B, D), and where it looks in the last block (B, H, 1 + patches)."""
    for x, used in vit.run(images):
        pass
    bias = None if used.bias is None else used.bias[:, :, :1]
    rows = attention_map(Attended(used.q[:, :, :1], used.k, bias=bias))[:, :, 0].float()
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


def row_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL divergence of the teacher's rows from the student's, summed over heads, mean of images."""
    theirs = interpolated(theirs, ours.shape[-1] - 1)
    if ours.shape[1] != theirs.shape[1]:
        ours, theirs = (aggregated(row.clamp_min(1e-9).log()) for row in (ours, theirs))
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


def task(settings: Settings, dataset: data.Data | None = None) -> train.Task:
    """Everything that train.fit needs. `dataset`: used instead of what the settings name."""
    device = launch.device(settings.device)
    dataset = dataset or data.load(settings, device)
    source = find_teacher(settings, dataset)
    teacher = checkpoints.load(source, image_size=dataset.image_size, classes=0)
    if not teacher.config.class_token:
        raise ValueError(f"--teacher {source.source}: has no class token")
    dataset.adopt(source)
    teacher.to(device).eval().requires_grad_(False)
    torch.manual_seed(settings.seed)
    other = {"heads": settings.num_heads} if settings.num_heads else {}
    net = Student(dino.encoder(settings, dataset, **other), teacher.config.dim).to(device)
    return train.Task(
        "attndistill",
        net,
        dataset,
        loss=partial(loss, teacher=teacher, weight=settings.attention_weight),
        test=partial(tested, dataset=dataset),
        export=export,
        teacher=source,
    )


def tested(net: Student, dataset: data.Data) -> dict[str, Tensor]:
    return dino.nearest(net.vit, dataset)


def find_teacher(settings: Settings, dataset: data.Data) -> checkpoints.Checkpoint:
    """The teacher that is named, or one made by DINO here first."""
    if settings.teacher == "auto":
        return checkpoints.read(teachers.make("dino", dino, settings, dataset))
    return checkpoints.read(settings.teacher)


def export(net: Student) -> dict:
    return checkpoints.export(net.vit)


def main(settings: Settings) -> dict:
    runs.check(settings, "attndistill")
    return train.fit(task(settings), settings)


if __name__ == "__main__":
    launch.run(main, parse)
