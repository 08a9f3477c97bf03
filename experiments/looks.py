"""Where trained ViTs look, and how similar they are to their teacher. Reads finished runs."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

import data
import look
from common.augment import hash_seed
from common.launch import get_device
from datasets import digits
from experiments.estimates import BASELINE, estimate_over_seeds
from experiments.measures import compare, entropy, jensen_shannon, renormalise
from experiments.study import Runs
from pretrain import patchify
from teachers.load import Model, build, open_model

Pairs = dict[str, tuple[Tensor, Tensor]]  # the numbers of a query's and a key's patch, (images,)
PATCHES = ("digit", "distractor", "blank")
AT_A_TIME, IMAGES = 100, 500  # test images. Of the digits those of one place


def find_looks(runs: Runs) -> dict:
    """For each row and for its teachers, lists over layers: means over seeds, and intervals.

    from_centre: in scenes, how much of its attention the centre pays to the cell asked for;
    from_asked: and that cell to the centre; from_twin: and a twin to the other.
    digit, distractor, blank: shares of the patches' attention, mean over images, heads, patches.
    `patches` has the shares that uniform attention would give.
    from_mean: the divergence of a map from the mean over images, in nats (Jensen-Shannon).
    of_image: the share that the image adds to what a map says.
    divergence, matched: of the maps from the teacher's, heads as they stand or matched.
    cka: of the features with the teacher's.
    """
    points = {}
    for point, of_rows in runs.items():
        teachers = [job.get_settings().teacher for job in of_rows["attention copy"]]
        if len(teachers) < 2:
            raise ValueError("looks are compared over seeds: ask for --seeds 2 or more")
        seeds = []
        for i, teacher in enumerate(teachers):
            nets = {"teacher": teacher}
            if len(set(teachers)) > 1:
                nets["another teacher"] = teachers[(i + 1) % len(teachers)]
            nets |= {row: jobs[i].out / "model.pt" for row, jobs in of_rows.items()}
            seeds.append(find_of_seed(nets, of_rows["attention copy"][i].get_settings()))
        points[point] = average_seeds(seeds)
    return points


@torch.no_grad()
def draw_scenes(runs: Runs):
    """Where the centre of scenes looks in layer 0, and where all cells look in layer 1."""
    (of_rows,), looks = runs.values(), {}
    settings = of_rows["attention copy"][0].get_settings()
    images = load_scenes(settings)[0][:4]
    nets = {"teacher": settings.teacher}
    nets |= {row: of_rows[row][0].out / "model.pt" for row in ("attention distillation", BASELINE)}
    for name, path in nets.items():
        model = open_model(path, images.device)
        prefix = model.net.config.num_prefix_tokens
        centre = prefix + model.net.config.grid_size**2 // 2
        first, second, *_ = (qk.map() for _, qk in model.blockwise(images))
        looks[f"{name}: layer 0, from the centre"] = look.mean_look(first, prefix, query=centre)
        looks[f"{name}: layer 1, from all cells"] = look.mean_look(second, prefix)
    title = f"Where nets look: pointer scenes, seed {settings.seed}"
    marked = {name: centre - prefix for name in ("image", *looks) if "all cells" not in name}
    how = dict(title=title, marked=marked)
    return look.draw_overlays(images, looks, prefix, **how)


@torch.no_grad()
def find_of_seed(nets: dict[str, str | Path], settings) -> dict:
    device = get_device(settings.device)
    teacher = open_model(nets["teacher"], device)
    torch.manual_seed(hash_seed("random net", settings.seed))  # no training begins like this
    models = {"random net": Model(build(teacher.net.config).to(device).eval())}
    models |= {name: open_model(path, device) for name, path in nets.items()}
    found, kinds, pairs = {}, None, {}
    if settings.data == "digits":
        images, kinds = load_digits(settings, teacher.net.config.patch, device)
        shares = kinds.mean(dim=(0, 1))[:, None].tolist()
        found["patches"] = dict(zip(PATCHES, shares, strict=True))
    elif data.DATA_SETS[settings.data].module == "scenes":
        images, pairs = load_scenes(settings)
    else:
        images = load_photographs(settings)
    for name, model in models.items():
        similar = compare(teacher, model, images.split(AT_A_TIME))
        found[name] = measure_looks(model, images, kinds, pairs)
        for what in ("divergence", "matched"):
            found[name][what] = [layer[what] for layer in similar["layers"]]
        found[name]["cka"] = np.diag(similar["cka"]).tolist()
    return found


def load_photographs(settings) -> Tensor:
    """IMAGES of the test images, evenly spaced: a folder is sorted by class."""
    dataset = data.load(settings, train=False)
    images = torch.cat([some for some, _ in dataset.test.in_order(256)])
    return images[:: max(1, len(images) // IMAGES)][:IMAGES]


def load_scenes(settings) -> tuple[Tensor, Pairs]:
    """IMAGES of the test scenes, and which cell should look at which."""
    dataset = data.load(replace(settings, label="cell"), train=False)
    images, asked = next(dataset.test.in_order(IMAGES))
    cells = patchify(images, settings.patch)
    centre = torch.full_like(asked, cells.shape[1] // 2)
    if settings.scene == "pointer":
        return images, {"from_centre": (centre, asked), "from_asked": (asked, centre)}
    apart = torch.cdist(cells, cells)
    apart.diagonal(dim1=1, dim2=2).fill_(math.inf)
    twin = apart.argmin(dim=-1).gather(1, asked[:, None])[:, 0]
    return images, {"from_twin": (twin, asked)}


def load_digits(settings, patch: int, device) -> tuple[Tensor, Tensor]:
    """IMAGES of the test digits, and the kind of each patch."""
    split = digits.Split(settings.distractors, device)
    canvases = [canvas[:IMAGES] for canvas in split.layers("test")]
    return torch.maximum(*canvases), find_kinds(*canvases, patch)


def find_kinds(digit: Tensor, distractors: Tensor, patch: int) -> Tensor:
    """1 where a patch is that of PATCHES, else 0: (images, patches, 3)."""

    def has_ink(canvas: Tensor) -> Tensor:
        return rearrange(canvas, "b 1 (h p) (w q) -> b (h w) (p q)", p=patch, q=patch).amax(-1) > 0

    kinds = torch.where(has_ink(digit), 0, torch.where(has_ink(distractors), 1, 2))
    return F.one_hot(kinds, len(PATCHES)).float()


def measure_looks(model: Model, images: Tensor, kinds: Tensor | None, pairs: Pairs) -> dict:
    """For each layer how far maps change with the image, and shares of attention."""
    some = images.split(AT_A_TIME)
    maps = [torch.stack([qk.map() for _, qk in model.blockwise(x)]) for x in some]
    p = torch.cat(maps, dim=1)  # (layers, images, H, N, N)
    found, each = measure_change(p), torch.arange(len(images))
    prefix = model.net.config.num_prefix_tokens
    for name, (query, key) in pairs.items():
        found[name] = p[:, each, :, prefix + query, prefix + key].mean(dim=(0, 2)).tolist()
    if kinds is None:
        return found
    patches = kinds.shape[1]
    among = renormalise(p[..., -patches:, -patches:])  # the class token is no place
    shares = einsum(among, kinds, "l b h q k, b k c -> c l b h q").mean(dim=(2, 3, 4))
    return dict(zip(PATCHES, shares.tolist(), strict=True)) | found


def measure_change(p: Tensor) -> dict[str, list[float]]:
    """How far maps (layers, images, H, N, N) are from their mean over images, for each layer.

    What a map says is its divergence (Kullback-Leibler) from uniform attention. On average over
    images that is what the mean map says, plus the mean divergence from it. of_image: the share of
    the second part, which the image adds.
    """
    position = p.mean(dim=1, keepdim=True)
    from_mean = jensen_shannon(p, position).mean(dim=(1, 2, 3))
    least, most = (entropy(maps).mean(dim=(1, 2, 3)) for maps in (p, position))
    of_image = (most - least) / (math.log(p.shape[-1]) - least)
    return {"from_mean": from_mean.tolist(), "of_image": of_image.tolist()}


def average_seeds(seeds: list) -> dict:
    """Means over seeds, and intervals, of lists that lie equally deep in each."""
    first = seeds[0]
    if isinstance(first, dict):
        return {key: average_seeds([seed[key] for seed in seeds]) for key in first}
    cells = [estimate_over_seeds(np.array(of_layer)) for of_layer in zip(*seeds, strict=True)]
    return {what: [cell[what] for cell in cells] for what in ("mean", "interval", "values")}
