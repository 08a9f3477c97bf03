"""Where trained ViTs look, and how like each other their features are."""

import math
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

import data
from common.augment import hash_seed
from common.launch import get_device
from study.engine import Runs, Table, estimate_accuracies
from study.estimates import estimate_layers, estimate_over_seeds
from study.jobs import Job
from study.rows import COPY, MEAN
from teachers.load import Model, build, open_model

IMAGES = 500  # of the test


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats along the last dimension: from 0 (one token) to ln N (uniform)."""
    return torch.special.entr(p).sum(dim=-1)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats along the last dimension: 0 if equal, ln 2 if disjoint."""
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of features x (n, D1) and y (n, D2) of the same n images.

    1 for a rotation, 0 for no relation (Kornblith et al. 2019). HSIC is estimated without bias
    (Song et al. 2012, equation 5), because there may be more features than images.
    """
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    gram_x, gram_y = (gram - gram.diag().diag() for gram in (x @ x.T, y @ y.T))
    return (hsic(gram_x, gram_y) / (hsic(gram_x, gram_x) * hsic(gram_y, gram_y)).sqrt()).item()


def hsic(a: Tensor, b: Tensor) -> Tensor:
    n = len(a)
    means = a.sum() * b.sum() / ((n - 1) * (n - 2))
    return ((a * b).sum() + means - 2 * (a.sum(0) @ b.sum(0)) / (n - 2)) / (n * (n - 3))


def diverge(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler, in nats, a mean of each layer: (layers, images, H, N, N) to (layers,)."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(dim=-1).mean(dim=(1, 2, 3))


def measure_change(p: Tensor) -> list[float]:
    """How far maps are from their mean over images, as a share of how far from uniform ones."""
    uniform = torch.full_like(p, 1 / p.shape[-1])
    return (diverge(p, p.mean(dim=1, keepdim=True)) / diverge(p, uniform)).tolist()


def measure_learned(p: Tensor, of: Tensor) -> list[float]:
    """How much maps p know of what images add to others: 1 if all, 0 if no more than their mean."""
    return (1 - diverge(of, p) / diverge(of, of.mean(dim=1, keepdim=True))).tolist()


@torch.no_grad()
def find_looks(_: Table, runs: Runs) -> dict:
    """For each row and for its teachers, lists over layers: means over seeds, and intervals.

    of_image: the share that the image adds to what a map says. from_centre: how much of its
    attention the centre pays to the cell asked for; from_twin: and a twin to the other.
    of_teacher: how much it knows of what photographs add to the teacher's maps.
    """
    ((point, of_rows),) = runs.items()
    found: dict[str, list] = {}
    for i, job in enumerate(of_rows[COPY]):
        settings = job.get_settings()
        images, asked = load_images(settings)
        teacher = open_model(settings.teacher, images.device, images.shape[-1])
        torch.manual_seed(hash_seed("random net", settings.seed))  # no training begins like this
        random = Model(build(teacher.net.config).to(images.device).eval())
        models = {"random net": random, "teacher": teacher}
        models |= {row: open_run(jobs[i]) for row, jobs in of_rows.items()}
        maps = {  # (layers, B, H, N, N)
            name: torch.stack([qk.map() for _, qk in model.blockwise(images)])
            for name, model in models.items()
        }
        prefix, each = teacher.net.config.num_prefix_tokens, torch.arange(len(images))
        for name, p in maps.items():
            if asked:
                query, key = (prefix + cells for cells in asked)
                what = "from_centre" if settings.scene == "pointer" else "from_twin"
                of_layers = p[:, each, :, query, key].mean(dim=(0, 2)).tolist()
            else:
                what, of_layers = "of_teacher", measure_learned(p, maps["teacher"])
            found.setdefault(name, []).append({"of_image": measure_change(p), what: of_layers})
    rows: dict[str, dict] = {}
    for name, seeds in found.items():
        of_seeds = {what: zip(*(seed[what] for seed in seeds), strict=True) for what in seeds[0]}
        rows[name] = {what: estimate_layers(layers) for what, layers in of_seeds.items()}
    measure = "of each layer: shares of what a map says, and of attention"
    return {"points": {point: rows}, "measure": measure}


def load_images(settings) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Test images, and in scenes which cell should look at which: (query, key)."""
    if "scenes" not in settings.data:
        batches = data.load(settings, train=False).test.in_order(IMAGES)
        return torch.cat([images for images, _ in batches])[::6], None  # they are sorted by class
    dataset = data.load(replace(settings, label="cell"), train=False)
    images, asked = next(dataset.test.in_order(IMAGES))
    p = settings.patch
    cells = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
    if settings.scene == "pointer":
        return images, (torch.full_like(asked, cells.shape[1] // 2), asked)
    apart = torch.cdist(cells, cells)
    apart.diagonal(dim1=1, dim2=2).fill_(math.inf)
    return images, (apart.argmin(dim=-1).gather(1, asked[:, None])[:, 0], asked)


@torch.no_grad()
def find_likeness(table: Table, runs: Runs) -> dict:
    """Accuracies, and how like the teacher's the features are: CKA, a mean over layers."""
    found = estimate_accuracies(table, runs)
    for point, of_rows in runs.items():
        for row in of_rows.keys() - {MEAN}:  # whose lender is no ViT
            values = []
            for job, copy in zip(of_rows[row], of_rows[COPY], strict=True):  # which has the teacher
                settings, net = copy.get_settings(), open_run(job)
                dataset = data.load(settings, train=False)
                images, _ = next(dataset.test.in_order(IMAGES))
                teacher = open_model(settings.teacher, images.device, dataset.image_size)
                features = [average_patches(model, images) for model in (teacher, net)]
                values.append(np.mean([cka(x, y) for x, y in zip(*features, strict=True)]))
            found["points"][point][row]["CKA"] = estimate_over_seeds(np.array(values))
    return found


def average_patches(model: Model, images: Tensor) -> list[Tensor]:
    """The features of each layer (images, D): means over the patches."""
    patches, found = model.net.config.grid_size**2, []
    for some in images.split(50):
        found.append([x[:, -patches:].mean(dim=1) for x, _ in model.blockwise(some)])
    return [torch.cat(of_layer) for of_layer in zip(*found, strict=True)]


def open_run(job: Job) -> Model:
    return open_model(job.out / "model.pt", get_device(job.get_settings().device))
