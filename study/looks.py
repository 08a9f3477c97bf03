"""Where trained ViTs look in scenes, and how like their teacher's their features are."""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import data
from common import pictures
from common.augment import hash_seed
from common.launch import get_device
from pretrain import patchify
from study.analysis import entropy
from study.engine import Runs
from study.estimates import BASELINE, estimate_over_seeds
from study.jobs import Job
from teachers.load import Model, build, open_model

IMAGES = 500  # test images
MEASURE = "of each layer: shares of what a map says, and of attention"


@torch.no_grad()
def find_looks(runs: Runs) -> dict:
    """For each row and for its teachers, lists over layers: means over seeds, and intervals.

    of_image: the share that the image adds to what a map says.
    from_centre: how much of its attention the centre pays to the cell asked for;
    from_twin: and a twin to the other.
    """
    ((point, of_rows),) = runs.items()
    found: dict[str, list] = {}
    for i, job in enumerate(of_rows["attention copy"]):
        settings = job.get_settings()
        images, (query, key) = load_scenes(settings)
        models = {"random net": open_random(settings)}
        models["teacher"] = open_model(settings.teacher, images.device)
        models |= {row: open_run(jobs[i]) for row, jobs in of_rows.items()}
        for name, model in models.items():
            p = torch.stack([qk.map() for _, qk in model.blockwise(images)])  # (layers, B, H, N, N)
            prefix, each = model.net.config.num_prefix_tokens, torch.arange(len(images))
            paid = p[:, each, :, prefix + query, prefix + key].mean(dim=(0, 2))
            what = "from_centre" if settings.scene == "pointer" else "from_twin"
            found.setdefault(name, []).append({"of_image": measure_change(p), what: paid.tolist()})
    rows = {
        name: {what: average([seed[what] for seed in seeds]) for what in seeds[0]}
        for name, seeds in found.items()
    }
    return {"points": {point: rows}, "measure": MEASURE}


def average(seeds: list[list[float]]) -> dict[str, list]:
    """Means over seeds, and intervals, of lists over layers."""
    cells = [estimate_over_seeds(np.array(of_layer)) for of_layer in zip(*seeds, strict=True)]
    return {what: [cell[what] for cell in cells] for what in ("mean", "interval", "values")}


def measure_change(p: Tensor) -> list[float]:
    """What images add to maps (layers, images, H, N, N), as a share of what these say.

    What a map says is its divergence (Kullback-Leibler) from uniform attention. On average over
    images that is what the mean map says, plus the mean divergence from it: the second part.
    """
    least, most = (entropy(maps).mean(dim=(1, 2, 3)) for maps in (p, p.mean(dim=1, keepdim=True)))
    return ((most - least) / (math.log(p.shape[-1]) - least)).tolist()


def open_run(job: Job) -> Model:
    return open_model(job.out / "model.pt", get_device(job.get_settings().device))


def open_random(settings) -> Model:
    """A random net like the teacher's."""
    teacher = open_model(settings.teacher, get_device(settings.device))
    torch.manual_seed(hash_seed("random net", settings.seed))  # no training begins like this
    return Model(build(teacher.net.config).to(get_device(settings.device)).eval())


def load_scenes(settings) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """IMAGES of the test scenes, and which cell should look at which: (query, key)."""
    dataset = data.load(replace(settings, label="cell"), train=False)
    images, asked = next(dataset.test.in_order(IMAGES))
    cells = patchify(images, settings.patch)
    if settings.scene == "pointer":
        return images, (torch.full_like(asked, cells.shape[1] // 2), asked)
    apart = torch.cdist(cells, cells)
    apart.diagonal(dim1=1, dim2=2).fill_(math.inf)
    return images, (apart.argmin(dim=-1).gather(1, asked[:, None])[:, 0], asked)


@torch.no_grad()
def draw_scenes(runs: Runs):
    """Where the centre of scenes looks in layer 0, and where all cells look in layer 1."""
    (of_rows,), looks = runs.values(), {}
    settings = of_rows["attention copy"][0].get_settings()
    images = load_scenes(settings)[0][:4]
    nets = {"teacher": open_model(settings.teacher, images.device)}
    nets |= {row: open_run(of_rows[row][0]) for row in ("attention distillation", BASELINE)}
    for name, model in nets.items():
        prefix = model.net.config.num_prefix_tokens
        centre = prefix + model.net.config.grid_size**2 // 2
        first, second, *_ = (qk.map() for _, qk in model.blockwise(images))
        looks[f"{name}: layer 0, from the centre"] = pictures.mean_look(first, prefix, query=centre)
        looks[f"{name}: layer 1, from all cells"] = pictures.mean_look(second, prefix)
    title = f"Where nets look: pointer scenes, seed {settings.seed}"
    marked = {name: centre - prefix for name in ("image", *looks) if "all cells" not in name}
    how = dict(title=title, marked=marked)
    return pictures.draw_overlays(images, looks, prefix, **how)
