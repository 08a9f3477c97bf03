"""Scenes: images in a grid of cells, and a question that only looking can answer.

    --scene pointer    a bright square in the centre cell points to another cell
    --scene twins      pairs of one class each; the images of one pair are equal

The label is the class in the cell pointed to, or of the twins. `--label cell`: that cell or a twin.
`--dial 0.5`: half of the pointers are turned to the first cell, and the rest point anywhere.
`--classes`: which the cells show. `--image-size`: a larger image has more cells of that size.
Pixels have noise, in training anew at every step.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common.augment import BatchRandom, seeded
from common.settings import parse_layers
from datasets import digits
from datasets.sources import Parts, Tensors, hold_out

COUNT = {"train": 20_000, "val": 2_000, "test": 2_000}  # scenes of each part
SQUARE = 0.25  # side of the square, over that of a cell
NOISE = 0.2  # pixels of 0..1 change by up to this


def load(settings, row, size: int, device, with_train: bool = True) -> Parts:
    if settings.data == "scenes":
        pools = [Tensors(*part) for part in digits.read_parts(device).values()]
        names = list("0123456789")
    else:
        from datasets import cifar  # slow to import

        photos = replace(settings, data=settings.data.removeprefix("scenes-"))
        found = cifar.load(photos, row._replace(image_size=32), 32, device)
        if found.val or not found.test:
            raise ValueError(f"--data {settings.data}: --data-dir takes train/ and val/, no more")
        cached = [source.cache(centred=True) for source in hold_out(found, 0.1)]
        pools = [replace(x, images=F.avg_pool2d(x.images / 255, 4)) for x in cached]
        names = found.classes
    kinds = parse_layers(settings.classes, len(names), "classes")
    if settings.scene == "twins" and (settings.dial or len(kinds) < 3):
        raise ValueError("--scene twins: it takes three --classes or more, and no --dial")
    grid, rest = divmod(size, cell := pools[0].images.shape[-1])
    if rest or grid not in (3, 5, 7):  # a square has seven places a side
        raise ValueError(f"--image-size {size}: choose {3 * cell}, {5 * cell} or {7 * cell}")
    cells = [f"cell {i}" for i in range(grid**2)]
    labels = cells if settings.label == "cell" else [names[kind] for kind in kinds]
    draws = [seeded("scenes", settings.scene, part) for part in COUNT]
    parts = zip(COUNT, pools, draws, strict=True)
    train, val, test = [draw_scenes(*part, kinds, settings, grid) for part in parts]
    return Parts(labels, train, val, test, augment)


def draw_scenes(part: str, source: Tensors, draws, kinds: list[int], settings, grid) -> Tensors:
    """Scenes (n, c, size, size) of 0..1 and their labels (n,), known by the files of `source`."""
    device, images, labels = source.images.device, source.images.cpu(), source.labels.cpu()
    images = (images if images.ndim == 4 else images[:, None])[labels.argsort(stable=True)]
    sizes = labels.bincount(minlength=max(kinds) + 1)  # of the classes, which lie one by one
    if sizes[kinds].min() < 1 + (settings.scene == "twins"):
        raise ValueError(f"some class has too few {part} images: add some, or choose --classes")
    pool = images, (sizes.cumsum(0) - sizes)[kinds], sizes[kinds]
    draw = draw_pointers if settings.scene == "pointer" else draw_twins
    cells, kind, cell = draw(COUNT[part], grid, *pool, settings.dial, draws)
    scenes = rearrange(cells, "n (h w) c p q -> n c (h p) (w q)", h=grid)
    if part != "train":  # to which augment adds it
        scenes = add_noise(scenes, torch.rand(scenes.shape, generator=draws))
    labels = cell if settings.label == "cell" else kind
    return replace(source, images=scenes.to(device), labels=labels.to(device))


def draw_pointers(count: int, grid: int, images, starts, sizes, dial: float, draws):
    """Cells (count, grid^2, c, p, p); what is pointed to: its kind (count,), its cell (count,).

    `images` (n, c, p, p) are sorted by kind: each has `sizes` images, from index `starts` on.
    """
    kinds = torch.randint(len(sizes), (count, grid**2), generator=draws)
    which = (torch.rand(kinds.shape, generator=draws) * sizes[kinds]).long()
    cells = images[starts[kinds] + which]
    cell = torch.randint(grid**2 - 1, (count,), generator=draws)
    cell += cell >= grid**2 // 2  # any but the centre
    cell[torch.rand(count, generator=draws) < dial] = 0
    cells[:, grid**2 // 2] = draw_squares(grid, cells.shape[2:])[cell]
    return cells, kinds.gather(1, cell[:, None])[:, 0], cell


def draw_squares(grid: int, shape: tuple[int, ...]) -> Tensor:
    """For each cell of the grid the picture (c, p, p) of a square that points to it."""
    side, pictures = max(1, round(SQUARE * shape[-1])), torch.zeros(grid**2, *shape)
    edges = torch.linspace(0, shape[-1] - side, grid).round().int().tolist()
    for i, picture in enumerate(pictures):
        y, x = edges[i // grid], edges[i % grid]
        picture[:, y : y + side, x : x + side] = 1
    return pictures


def draw_twins(count: int, grid: int, images, starts, sizes, dial: float, draws):
    """As draw_pointers: pairs of one kind each, one of them twice the same image."""
    pairs = min(len(sizes) - 1, (grid**2 - 1) // 2)  # cells that are left stay empty
    kinds = torch.rand(count, len(sizes), generator=draws).argsort(dim=1)[:, :pairs]
    first, step = torch.rand(2, count, pairs, generator=draws)
    first = (first * sizes[kinds]).long()
    step = 1 + (step * (sizes[kinds] - 1)).long()  # to another image of the kind
    step[:, 0] = 0  # the twins: to the same
    which = torch.cat([first, (first + step) % sizes[kinds]], dim=1)
    places = torch.rand(count, grid**2 - 1, generator=draws).argsort(dim=1)[:, : 2 * pairs]
    places += places >= grid**2 // 2  # any but the centre
    cells = images.new_zeros(count, grid**2, *images.shape[1:])
    cells[torch.arange(count)[:, None], places] = images[starts[kinds].repeat(1, 2) + which]
    return cells, kinds[:, 0], places[:, 0]


def add_noise(scenes: Tensor, u: Tensor) -> Tensor:
    """Scenes with the noise that numbers `u` in 0..1 make, as images: their pixels are clipped."""
    return (scenes + NOISE * (2 * u.view_as(scenes) - 1)).clamp(0, 1)


def augment(scenes: Tensor, draws: BatchRandom) -> Tensor:
    """Noise, anew at every step."""
    return add_noise(scenes, draws.uniform(math.prod(scenes.shape[1:])))
