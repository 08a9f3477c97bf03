"""AttnDistill: a small ViT learns, without labels, a class token and where it looks.

Wang, Yang and van de Weijer, BMVC 2022 (arXiv 2210.00944). Only the last block
counts, and only the class token's row of its maps:

    loss = MSE(P(class token of the student), class token of the teacher)
           + weight * KL(row of the teacher | row of the student)

P is a small MLP. If the teacher has smaller patches, its row is interpolated to
the student's. If it has other heads, the heads of each are merged. The paper's
teachers have no labels. On our digits DINO made too weak a teacher, so the
class token of ours has learned from labels.

    python -m related.attndistill                     trains that teacher first
    python -m related.attndistill --data folder --data-dir photos --teacher NAME
    python -m related.attndistill --attention-weight 0 --out runs/token  control

The test classifies each class token by its 20 nearest neighbours (Caron et al.
2021, section 3.2). Labels are used for nothing else.
"""

import copy
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import data
import recipes
import train
from common import checkpoints, launch
from common.settings import merge_recipes, parse_settings, setting
from teachers import find
from teachers.load import build_vit, new_vit
from vit import QK, ViT

TEMPERATURE = 10.0  # of merged heads, in the authors' scripts


@dataclass(frozen=True)
class Settings(recipes.Settings):
    data: str = setting("digits", "data set", tuple(recipes.DATA_SETS))
    method = "attndistill"
    unused = "layer_decay", "smoothing"  # the layers are inside, the labels outside
    teacher: str = setting(
        "auto", "a ViT with a class token, auto: made here, none: makes one", free=True
    )
    normalization: str = setting("", recipes.NORMALIZATION, ("", *recipes.NORMALIZATIONS))
    attention_weight: float = setting(0.1, "weight of the class token's row (0: none)")


SHARED = dict(num_labels=0, weight_decay=0.05, beta2=0.95, ema=0.0, final_lr=0.0, drop_path=0.0)
PHOTOS = SHARED | dict(random_erase=0.0, randaugment=0, mixup=0.0, cutmix=0.0, clip=0.0)
RECIPES = merge_recipes(  # close to pretrain.py's
    recipes.RECIPES,
    digits=SHARED | dict(model="nano", epochs=40, batch=128, blr=4e-3),
    cifar=PHOTOS | dict(model="mini", epochs=200, warmup=0.05, batch=1024, blr=2.5e-4),
    imagenet=PHOTOS | dict(epochs=800, warmup=0.05, batch=4096, blr=1.5e-4, crop_area=0.2),
    folder=PHOTOS | dict(epochs=150, warmup=0.0667, blr=4e-3, crop_area=0.2),
)
parse = partial(parse_settings, __doc__, Settings, RECIPES)


class Student(nn.Module):
    """A ViT, and the MLP that makes its class token comparable with the teacher's."""

    def __init__(self, vit: ViT, dim: int):
        super().__init__()
        self.vit, own = vit, vit.config.dim
        layers: list[nn.Module] = [nn.LayerNorm(own, eps=1e-6)]
        for into, out in pairwise((own, 2 * own, own, 2 * own)):
            layers += [nn.Linear(into, out), nn.GELU()]
        self.project = nn.Sequential(*layers, nn.Linear(2 * own, dim), nn.LayerNorm(dim, eps=1e-6))
        self.config = vit.config


def look_last(vit: ViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """The class token (B, D) before the last norm, and where it looks (B, H, 1 + patches)."""
    *_, (x, qk) = vit.blockwise(images)
    bias = None if qk.bias is None else qk.bias[:, :, :1]
    rows = QK(qk.q[:, :, :1], qk.k, bias).map()[:, :, 0].float()
    patches = rows[..., vit.config.num_prefix_tokens :]  # registers are no places
    return x[:, 0], torch.cat([rows[..., :1], patches], dim=-1)


def interpolate(row: Tensor, patches: int) -> Tensor:
    """Rows (B, H, 1 + n^2) for another number of patches. The class token's share stays."""
    if row.shape[-1] == 1 + patches:
        return row
    first, rest = row[..., :1], row[..., 1:]
    grid = rearrange(rest, "b h (y x) -> b h y x", y=math.isqrt(rest.shape[-1]))
    side = math.isqrt(patches)
    # Bicubic interpolation makes some places negative.
    grid = F.interpolate(grid, size=(side, side), mode="bicubic").flatten(2).clamp_min(0)
    return torch.cat([first, grid * (1 - first) / grid.sum(dim=-1, keepdim=True)], dim=-1)


def merge_heads(log_p: Tensor) -> Tensor:
    """Section 3: all heads as one, from the logs of maps: (B, H, ..., N) to (B, 1, ..., N)."""
    return (log_p.sum(dim=1, keepdim=True) / TEMPERATURE).softmax(dim=-1)


def row_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL divergence of the teacher's rows from the student's, summed over heads, mean of images."""
    theirs = interpolate(theirs, ours.shape[-1] - 1)
    if ours.shape[1] != theirs.shape[1]:
        ours, theirs = (merge_heads(row.clamp_min(1e-9).log()) for row in (ours, theirs))
    p, p_t = (F.normalize(row.clamp(1e-5, 0.996), p=1.0, dim=-1) for row in (ours, theirs))
    return F.kl_div(p.log(), p_t, reduction="batchmean")


def loss(net: Student, images: Tensor, labels, teacher: ViT, weight: float):
    with torch.no_grad():
        token_t, row_t = look_last(teacher, images)
        token_t = teacher.fc_norm(token_t)
    token, row = look_last(net.vit, images)
    terms = {"token": F.mse_loss(net.project(token), token_t)}
    if weight:
        terms["attention"] = weight * row_loss(row, row_t)
    return sum(terms.values()), terms


def label_loss(net: ViT, images: Tensor, labels):
    """Of a teacher: its head reads the class token."""
    return F.cross_entropy(net.head(get_class_token(net, images)), labels), {}


def task(settings: Settings, dataset: data.Data) -> train.Task:
    checkpoint, device = find_teacher(settings, dataset), dataset.train.device
    how = dict(predict=None, export=export, checkpoint=checkpoint)
    if not checkpoint:
        torch.manual_seed(settings.seed)
        return train.Task(new_vit(settings, dataset).to(device), dataset, label_loss, **how)
    teacher = build_vit(checkpoint, dataset.image_size, classes=0)
    if teacher.cls_token is None:
        raise ValueError(f"--teacher {settings.teacher}: has no class token")
    teacher.to(device).eval().requires_grad_(False)
    torch.manual_seed(settings.seed)
    net = Student(new_vit(settings, dataset, classes=0), teacher.config.dim).to(device)
    net.vit.fc_norm.requires_grad_(False)  # as theirs: it is for the neighbours of the test
    own_loss = partial(loss, teacher=teacher, weight=settings.attention_weight)
    return train.Task(net, dataset, own_loss, **how)


def find_teacher(settings: Settings, dataset: data.Data) -> checkpoints.Checkpoint | None:
    """The named ViT, or one that is made here first."""
    if settings.teacher == "auto":
        own = dict(model="micro", teacher="none")
        made = find.make_teacher(sys.modules[__name__], settings, dataset, **own)
        settings = replace(settings, teacher=str(made))
    settings = replace(settings, given=frozenset())  # --model and --patch are the student's alone
    return find.find_teacher(settings, dataset)


def get_class_token(vit: ViT, images: Tensor) -> Tensor:
    """As the last block leaves it, normalised: (B, D)."""
    return vit.fc_norm(vit.forward_features(images))[:, 0]


def export(net: nn.Module) -> dict:
    """The ViT without a head: others would let it read the patches, not the class token."""
    found = checkpoints.export(getattr(net, "vit", net))
    weights = {k: v for k, v in found["model"].items() if not k.startswith("head.")}
    return found | {"model": weights, "architecture": found["architecture"] | {"classes": 0}}


def classify_by_neighbours(net: nn.Module, dataset: data.Data) -> dict[str, Tensor]:
    """Classes of the test images by the 20 nearest neighbours of class tokens, and the true ones.

    They are among 4,000 training images, augmented, and vote with exp(cosine similarity / 0.07).
    """
    vit, (bank, labels) = getattr(net, "vit", net), dataset.train.first(4000)
    known = torch.cat([F.normalize(get_class_token(vit, some)) for some in bank.split(256)])
    found, images = [], copy.copy(dataset.test)
    images.rank, images.world = 0, 1  # all of them, also as one of many processes
    for x, truth in images.in_order(256):
        near, which = (F.normalize(get_class_token(vit, x)) @ known.T).topk(min(20, len(known)))
        votes = torch.zeros(len(x), len(dataset.classes), device=x.device)
        votes.scatter_add_(1, labels[which], (near / 0.07).exp())
        found.append(torch.stack([votes.argmax(dim=1), truth]))
    return dict(zip(("predicted", "labels"), torch.cat(found, dim=1), strict=True))


def main(settings: Settings) -> dict:
    dataset = data.load(settings)
    dataset.check_classes()
    test = partial(classify_by_neighbours, dataset=dataset)
    return train.fit(task(settings, dataset), settings, test)


if __name__ == "__main__":
    launch.run(main, parse)
