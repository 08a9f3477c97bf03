"""Where trained models look: at the digit, at scraps or at nothing; how like their teacher.

All of it is read off finished runs; nothing is trained.
"""

import launch

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

import checkpoints
import digits
import vit
from attention import attention_map
from augment import Normalise, number
from checkpoints import Model
from data import KINDS
from experiments.analysis import compare, jensen_shannon
from experiments.estimates import over_seeds
from experiments.jobs import Job, Made

KINDS_OF_PATCH = ("digit", "scrap", "blank")
AT_A_TIME, IMAGES = 100, 500  # of the test images, those of one place


def looks(made: Made) -> dict:
    """Of each row, and of its teachers: where they look, how like the first teacher.

    digit, scrap, blank: shares of the attention of patches, mean over images, heads and patches,
    that go to patches with ink of the digit, of scraps only, or none; `patches` has the shares of
    the patches. from_mean: how far a map is from the mean over images of these maps, in nats
    (Jensen-Shannon): 0 if it does not depend on the image. divergence, matched: of the maps from
    the teacher's, heads as they stand and heads matched; cka: of the features. All are lists over
    layers: means over seeds, and their intervals. Two rows bound the likeness: a teacher of another
    seed, and a random net.
    """
    points = {}
    for point, of_rows in made.items():
        teachers = [job.settings().teacher for job in of_rows["attention copy"]]
        if len(teachers) < 2:
            raise ValueError("looks are compared with another teacher's: ask for --seeds 2 or more")
        others = teachers[1:] + teachers[:1]  # of other seeds
        seeds = zip(teachers, others, *of_rows.values(), strict=True)
        found = [of_seed(a, b, dict(zip(of_rows, jobs, strict=True))) for a, b, *jobs in seeds]
        points[point] = summed_up(found)
    return points


@torch.no_grad()
def of_seed(teacher_at: str, other_at: str, by_row: dict[str, Job]) -> dict:
    settings = by_row["attention copy"].settings()
    device = launch.device(settings.device)
    teacher = checkpoints.open_model(teacher_at, device)
    torch.manual_seed(number("random net", settings.seed))  # no training begins so
    random = Model(vit.ViT(teacher.net.config).to(device).eval())
    models = {"teacher": teacher, "random net": random}
    models["another teacher"] = checkpoints.open_model(other_at, device)
    for row, job in by_row.items():
        models[row] = checkpoints.open_model(job.out / "model.pt", device)

    normalise = Normalise(KINDS["digits"].normalization, device)
    split = digits.Split(settings.scraps, normalise, device)
    canvases = [canvas[:IMAGES] for canvas in split.layers("test")]
    kinds = kinds_of_patches(*canvases, teacher.net.config.patch)
    images = normalise(torch.maximum(*canvases)).split(AT_A_TIME)
    shares = F.one_hot(kinds, len(KINDS_OF_PATCH)).float().mean(dim=(0, 1))
    found = {"patches": dict(zip(KINDS_OF_PATCH, shares[:, None].tolist(), strict=True))}
    for name, model in models.items():
        alike = compare(teacher, model, images)
        found[name] = where(model, images, kinds.split(AT_A_TIME))
        for what in ("divergence", "matched"):
            found[name][what] = [layer[what] for layer in alike["layers"]]
        found[name]["cka"] = np.diag(alike["cka"]).tolist()
    return found


def kinds_of_patches(digit: Tensor, scraps: Tensor, patch: int) -> Tensor:
    """Which of KINDS_OF_PATCH each patch is: (images, patches)."""

    def inked(canvas: Tensor) -> Tensor:
        return rearrange(canvas, "b 1 (h p) (w q) -> b (h w) (p q)", p=patch, q=patch).amax(-1) > 0

    return torch.where(inked(digit), 0, torch.where(inked(scraps), 1, 2))


def where(model: Model, images: Iterable[Tensor], kinds: Iterable[Tensor]) -> dict:
    """Of each layer: shares of attention; how far maps are from their mean. As in `looks`."""
    shares, maps = [], []
    for some, kind in zip(images, kinds, strict=True):
        maps.append(torch.stack([attention_map(used) for _, used in model.run(some)]))
        patches = kind.shape[1]
        among = maps[-1][..., -patches:, -patches:]  # the class token is no place
        among = among / among.sum(dim=-1, keepdim=True)
        of_kind = F.one_hot(kind, len(KINDS_OF_PATCH)).float()
        shares.append(einsum(among, of_kind, "l b h q k, b k c -> c l b h q").mean(dim=(3, 4)))
    p = torch.cat(maps, dim=1)  # (layers, images, H, N, N)
    away = jensen_shannon(p, p.mean(dim=1, keepdim=True)).mean(dim=(1, 2, 3))
    shares = torch.cat(shares, dim=2).mean(dim=2).tolist()
    return dict(zip(KINDS_OF_PATCH, shares, strict=True)) | {"from_mean": away.tolist()}


def summed_up(seeds: list[dict]) -> dict:
    """Means over seeds, and intervals, of lists that lie equally deep in each."""
    first = seeds[0]
    if isinstance(first, dict):
        return {key: summed_up([seed[key] for seed in seeds]) for key in first}
    cells = [over_seeds(np.array(of_layer)) for of_layer in zip(*seeds, strict=True)]
    return {what: [cell[what] for cell in cells] for what in ("mean", "interval")}
