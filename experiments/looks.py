"""Where trained models look: on the digits at ink, at scraps or at nothing; how like their teacher.

All of it is read off finished runs; nothing is trained.
"""

import launch

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

import checkpoints
import data
import digits
import vit
from attention import attention_map
from augment import Normalise, number
from checkpoints import Model
from experiments.analysis import compare, entropy, jensen_shannon
from experiments.estimates import over_seeds
from experiments.jobs import Made
from settings import Settings

KINDS_OF_PATCH = ("digit", "scrap", "blank")
AT_A_TIME, IMAGES = 100, 500  # of the test images; of the digits those of one place


def looks(made: Made) -> dict:
    """Of each row, and of its teachers: where they look, how like the first teacher.

    Of the digits: digit, scrap, blank: shares of the attention of patches, mean over images, heads
    and patches, that go to patches with ink of the digit, of scraps only, or none; `patches` has
    the shares of the patches. from_mean: how far a map is from the mean over images of these maps,
    in nats (Jensen-Shannon): 0 if it does not depend on the image; of_image: the share of what
    maps say that does. divergence, matched: of the maps from the teacher's, heads as they stand and
    heads matched; cka: of the features. All are lists over layers: means over seeds, and their
    intervals. What bounds the likeness: a random net, and a teacher of another seed, where each
    seed has its own.
    """
    points = {}
    for point, of_rows in made.items():
        teachers = [job.settings().teacher for job in of_rows["attention copy"]]
        if len(teachers) < 2:
            raise ValueError("looks are compared over seeds: ask for --seeds 2 or more")
        found = []
        for i, jobs in enumerate(zip(*of_rows.values(), strict=True)):
            nets = {"teacher": teachers[i]}
            if len(set(teachers)) > 1:
                nets["another teacher"] = teachers[(i + 1) % len(teachers)]
            by_row = dict(zip(of_rows, jobs, strict=True))
            nets |= {row: job.out / "model.pt" for row, job in by_row.items()}
            found.append(of_seed(nets, by_row["attention copy"].settings()))
        points[point] = summed_up(found)
    return points


@torch.no_grad()
def of_seed(nets: dict[str, str | Path], settings: Settings) -> dict:
    device = launch.device(settings.device)
    teacher = checkpoints.open_model(nets["teacher"], device)
    torch.manual_seed(number("random net", settings.seed))  # no training begins so
    models = {"random net": Model(vit.ViT(teacher.net.config).to(device).eval())}
    models |= {name: checkpoints.open_model(path, device) for name, path in nets.items()}
    found = {}
    if settings.data == "digits":
        images, kinds = digits_and_kinds(settings, teacher.net.config.patch, device)
        shares = one_hot(kinds).mean(dim=(0, 1))
        found["patches"] = dict(zip(KINDS_OF_PATCH, shares[:, None].tolist(), strict=True))
    else:
        images, kinds = photographs(settings, teacher, device), None
    for name, model in models.items():
        alike = compare(teacher, model, images.split(AT_A_TIME))
        found[name] = where(model, images, kinds)
        for what in ("divergence", "matched"):
            found[name][what] = [layer[what] for layer in alike["layers"]]
        found[name]["cka"] = np.diag(alike["cka"]).tolist()
    return found


def photographs(settings: Settings, teacher: Model, device) -> Tensor:
    """IMAGES of the test images, of all classes alike."""
    shown = data.load(settings, device, train=False)
    shown.adopt(teacher.checkpoint)
    images = torch.cat([some for some, _ in shown.test.in_order(256)])
    return images[:: max(1, len(images) // IMAGES)][:IMAGES]


def digits_and_kinds(settings: Settings, patch: int, device) -> tuple[Tensor, Tensor]:
    """IMAGES of the test digits, and of which kind each patch is."""
    normalise = Normalise(data.KINDS["digits"].normalization, device)
    split = digits.Split(settings.scraps, normalise, device)
    canvases = [canvas[:IMAGES] for canvas in split.layers("test")]
    return normalise(torch.maximum(*canvases)), kinds_of_patches(*canvases, patch)


def kinds_of_patches(digit: Tensor, scraps: Tensor, patch: int) -> Tensor:
    """Which of KINDS_OF_PATCH each patch is: (images, patches)."""

    def inked(canvas: Tensor) -> Tensor:
        return rearrange(canvas, "b 1 (h p) (w q) -> b (h w) (p q)", p=patch, q=patch).amax(-1) > 0

    return torch.where(inked(digit), 0, torch.where(inked(scraps), 1, 2))


def where(model: Model, images: Tensor, kinds: Tensor | None) -> dict:
    """Of each layer how far maps change with the image, and shares of attention, as in `looks`."""
    maps = [
        torch.stack([attention_map(used) for _, used in model.run(some)])
        for some in images.split(AT_A_TIME)
    ]
    p = torch.cat(maps, dim=1)  # (layers, images, H, N, N)
    found = changing(p)
    if kinds is None:
        return found
    patches = kinds.shape[1]
    among = p[..., -patches:, -patches:]  # the class token is no place
    among = among / among.sum(dim=-1, keepdim=True)
    shares = einsum(among, one_hot(kinds), "l b h q k, b k c -> c l b h q").mean(dim=(2, 3, 4))
    return dict(zip(KINDS_OF_PATCH, shares.tolist(), strict=True)) | found


def changing(p: Tensor) -> dict[str, list[float]]:
    """How far maps (layers, images, H, N, N) are from their mean over images, of each layer.

    of_image: what a map says is its divergence (Kullback-Leibler) from looking everywhere alike.
    Over images the mean of these is the divergence of the mean map, what position alone says, and
    the mean divergence from that map, what the image adds: this, as a share of both.
    """
    position = p.mean(dim=1, keepdim=True)
    from_mean = jensen_shannon(p, position).mean(dim=(1, 2, 3))
    least, most = (entropy(maps).mean(dim=(1, 2, 3)) for maps in (p, position))
    of_image = (most - least) / (math.log(p.shape[-1]) - least)
    return {"from_mean": from_mean.tolist(), "of_image": of_image.tolist()}


def one_hot(kinds: Tensor) -> Tensor:
    return F.one_hot(kinds, len(KINDS_OF_PATCH)).float()


def summed_up(seeds: list[dict]) -> dict:
    """Means over seeds, and intervals, of lists that lie equally deep in each."""
    first = seeds[0]
    if isinstance(first, dict):
        return {key: summed_up([seed[key] for seed in seeds]) for key in first}
    cells = [over_seeds(np.array(of_layer)) for of_layer in zip(*seeds, strict=True)]
    return {what: [cell[what] for cell in cells] for what in ("mean", "interval")}
