"""Compares two ViTs: where they look, and what they see.

    python -m experiments.analysis A/model.pt B/model.pt
    python -m experiments.analysis A/model.pt random --images 500
    python -m experiments.analysis A/model.pt B/model.pt --data imagenet \\
        --data-dir /imagenet --layer 18 --head 3

For each layer: the divergence between the two ViTs' attention maps (heads as
they stand, and heads matched as well as can be), the entropy of each head's
maps and how far it looks; and the similarity (CKA) of the features of every
pair of layers. A table on the terminal; in --out analysis.json, and as pictures
maps.png, rollout.png, divergence.png, heads.png and cka.png.

Any checkpoint will do: a teacher, a student (one of attention copy attends
with its teacher's maps), or "random" for B.
"""

import launch

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import checkpoints
import data
import pictures
import runs
import storage
import vit
from attention import attention_map
from augment import number
from checkpoints import Model
from experiments import figures
from settings import OPENING, Setting, Settings, parse_settings

SETTINGS = OPENING | {
    "images": Setting(200, "how many of the test images to compare on", low=4),
    "batch": Setting(50, "images at a time", low=1),
    "layer": Setting(0, "whose maps to draw, 1 the first (0: the last)"),
    "head": Setting(0, "whose maps to draw, 1 the first (0: the mean of all)"),
    "out": Setting("", "folder for the results (empty: runs/analysis-DATA)"),
}
POSITIONAL = ("checkpoints", "A and B: two model.pt, or one and 'random'")
parse = partial(parse_settings, __doc__, SETTINGS, positional=POSITIONAL)


# Where they look --------------------------------------------------------------------------------


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats along the last dimension: from 0 (at one token) to ln N (at all alike)."""
    return torch.special.entr(p).sum(dim=-1)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats along the last dimension: 0 if equal, ln 2 if disjoint."""
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def attention_distance(p: Tensor, config: vit.Config) -> Tensor:
    """The mean distance in pixels from a query's patch to where it looks: (B, H).

    `p`: maps (B, H, N, N) of a ViT; tokens that are no patches are left out (Dosovitskiy et al.
    2021, D.7).
    """
    p = p[:, :, config.prefix :, config.prefix :]
    p = p / p.sum(dim=-1, keepdim=True).clamp_min(1e-9)
    axis = torch.arange(config.side, device=p.device) * float(config.patch)
    spots = torch.cartesian_prod(axis, axis)
    return (p * torch.cdist(spots, spots)).sum(dim=-1).mean(dim=-1)


def rollout(maps: Iterable[Tensor]) -> Tensor:
    """Where what each token holds at the end came from: (B, N, N) (Abnar and Zuidema 2020).

    Each layer passes on half of what a token was (the residual branch) and half of what its heads
    looked at.
    """
    total = None
    for p in maps:
        mixed = 0.5 * p.mean(dim=1) + 0.5 * torch.eye(p.shape[-1], device=p.device)
        total = mixed if total is None else mixed @ total
    return total


def match(cost: np.ndarray) -> list[int]:
    """The column for each row of a square matrix such that each is taken once and the sum is least.

    Exact up to 16 rows, by trying each column for the first row and matching the rest (2^H
    subsets); beyond, no two rows could change their columns to the better.
    """
    if len(cost) > 16:
        return swapped(cost)

    @cache
    def best(free: frozenset[int]) -> tuple[float, tuple[int, ...]]:
        """Least cost, and columns, of the last rows, for which these columns are left."""
        if not free:
            return 0.0, ()
        row = len(cost) - len(free)
        rests = ((column, *best(free - {column})) for column in free)
        return min(
            (cost[row, column] + rest, (column, *columns)) for column, rest, columns in rests
        )

    return list(best(frozenset(range(len(cost))))[1])


def swapped(cost: np.ndarray) -> list[int]:
    """As `match`: columns, in any order at first, change places while that is better."""
    columns, before = np.arange(len(cost)), None
    while before is None or (columns != before).any():
        before = columns.copy()
        for i in range(len(cost)):
            for j in range(i):
                straight = cost[i, columns[i]] + cost[j, columns[j]]
                if cost[i, columns[j]] + cost[j, columns[i]] < straight:
                    columns[[i, j]] = columns[[j, i]]
    return columns.tolist()


# What they see ----------------------------------------------------------------------------------


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of features x (n, D1) and y (n, D2) of the same n images.

    1 for a rotation, 0 for no relation (Kornblith et al. 2019). With the unbiased estimate of HSIC
    (Song et al. 2012, equation 5): the usual one finds likeness between any two representations of
    more features than images.
    """
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    gram_x, gram_y = (gram - gram.diag().diag() for gram in (x @ x.T, y @ y.T))
    return (hsic(gram_x, gram_y) / (hsic(gram_x, gram_x) * hsic(gram_y, gram_y)).sqrt()).item()


def hsic(a: Tensor, b: Tensor) -> Tensor:
    n = len(a)
    means = a.sum() * b.sum() / ((n - 1) * (n - 2))
    return ((a * b).sum() + means - 2 * (a.sum(0) @ b.sum(0)) / (n - 2)) / (n * (n - 3))


# The comparison ---------------------------------------------------------------------------------


@torch.no_grad()
def compare(a: Model, b: Model, batches: Iterable[Tensor]) -> dict:
    """All figures of a comparison of two models on the same images: means over images and queries.

    layers: of each, `divergence` of the maps, head by head (as they stand) and `matched` (each of
    a's heads with the one of b's that `pairs` names), in nats; `entropy` of a's and b's heads, in
    nats; `distance` that they look, in pixels. cka: a's layers by b's, of the features' mean over
    patches, which is what the head of a ViT reads. Where one has other tokens beside the patches
    than the other, maps are compared over patches alone.
    """
    sums, features, count = {}, ([], []), 0
    cut, config = cut_to(a, b)
    for images in batches:
        count += len(images)
        traces = [list(model.run(images)) for model in (a, b)]
        for side, trace, model in zip(features, traces, (a, b), strict=True):
            prefix = model.net.config.prefix
            side.append(
                torch.stack([x[:, prefix:].mean(dim=1) for x, _ in trace]).cpu()
            )  # (layers, B, D)
        for i, pair in enumerate(zip(*traces, strict=False)):
            p, q = (cut(attention_map(used)) for _, used in pair)
            for what, value in compare_maps(p, q, config).items():
                sums[i, what] = sums.get((i, what), 0) + value.cpu()
    if count < 4:
        raise ValueError(f"{count} images are too few: the similarity of features needs at least 4")
    x, y = (torch.cat(side, dim=1) for side in features)
    alike = [[cka(one, other) for other in y] for one in x]
    if not np.isfinite(alike).all():
        raise ValueError(
            "features are not finite, or the same for all images: did the training of one diverge?"
        )
    depth = 1 + max(i for i, _ in sums)
    layers = [
        of_layer({what: sums[i, what] / count for what in ("pairs", "entropy", "distance")})
        for i in range(depth)
    ]
    return {"images": count, "layers": layers, "cka": alike}


def cut_to(a: Model, b: Model) -> tuple[Callable, vit.Config]:
    """What makes a map of either one that can be compared, and what kind of ViT it then is of.

    All of a map, if both have the same tokens; else that of patches to patches, renormalised.
    """
    ours, theirs = a.net.config, b.net.config
    if (ours.class_token, ours.registers) == (theirs.class_token, theirs.registers):
        return lambda p: p, ours

    def cut(p: Tensor) -> Tensor:
        p = p[..., -(ours.side**2) :, -(ours.side**2) :]
        return p / p.sum(dim=-1, keepdim=True).clamp_min(1e-9)

    return cut, replace(ours, class_token=False, registers=0)


def compare_maps(p: Tensor, q: Tensor, config: vit.Config) -> dict[str, Tensor]:
    """Sums over images: divergence of each pair of heads (H, H); entropy, distance (2, H)."""
    pairs = [jensen_shannon(head[:, None], q).mean(-1).sum(0) for head in p.unbind(1)]
    return {
        "pairs": torch.stack(pairs),
        "entropy": torch.stack([entropy(side).mean(-1).sum(0) for side in (p, q)]),
        "distance": torch.stack([attention_distance(side, config).sum(0) for side in (p, q)]),
    }


def of_layer(means: dict[str, Tensor]) -> dict:
    pairs = means["pairs"]
    columns = match(pairs.numpy())
    return {
        "divergence": pairs.diagonal().mean().item(),
        "by_head": pairs.diagonal().tolist(),
        "pairs": columns,
        "matched": pairs[range(len(pairs)), columns].mean().item(),
        "entropy": means["entropy"].tolist(),
        "distance": means["distance"].tolist(),
    }


# From the command line --------------------------------------------------------------------------


def open_pair(settings: Settings) -> tuple[Model, Model, data.Data, str]:
    """The two models, the images both can look at, and their name. ValueError if there are none.

    A model of others sees images of the size that the other one was trained with.
    """
    if len(settings.checkpoints) != 2 or settings.checkpoints[0] == "random":
        raise ValueError(
            "analysis compares two ViTs: name two checkpoints, or one and then 'random'"
        )
    device = launch.device(settings.device)
    first, second = settings.checkpoints
    named = [first] if second == "random" else [first, second]
    files = [checkpoints.read(name, settings.num_heads) for name in named]
    sizes = [file.architecture["image_size"] for file in files]
    if not files[-1].settings:
        sizes[-1] = sizes[0]
    elif not files[0].settings:
        sizes[0] = sizes[-1]
    a, *other = map(checkpoints.opened, files, [device] * 2, sizes)
    torch.manual_seed(number("random net"))  # no training begins so
    b = other[0] if other else Model(vit.ViT(a.net.config).to(device).eval())
    for what in ("image_size", "patch", "channels", "heads"):
        ours, theirs = (getattr(model.net.config, what) for model in (a, b))
        if ours != theirs:
            raise ValueError(
                f"maps of these two cannot be compared: their {what} differ ({ours} and {theirs})"
            )
    trained = [model.checkpoint for model in (a, b) if model.checkpoint]
    normalised = [checkpoint for checkpoint in trained if checkpoint.normalization]
    if any(c.normalization != normalised[0].normalization for c in normalised):
        raise ValueError(
            "these two were trained on images normalised differently: they cannot see the same ones"
        )
    depth = min(len(a.net.blocks), len(b.net.blocks))
    for name, value, count in (
        ("layer", settings.layer, depth),
        ("head", settings.head, a.net.config.heads),
    ):
        if value > count:
            raise ValueError(f"--{name} {value}: there are {count}")
    whose = b if b.checkpoint and not a.checkpoint.settings else a
    asked = whose.checkpoint.images(settings).but(image_size=a.net.config.image_size)
    dataset = data.load(asked, device, train=False)
    if dataset.channels != (channels := a.net.config.channels):
        raise ValueError(f"the ViTs take {channels} channels, the images have {dataset.channels}")
    if normalised:
        dataset.adopt(normalised[0])
    return a, b, dataset, asked.data


def first_images(dataset: data.Data, settings: Settings) -> Iterator[Tensor]:
    """The first --images of the test images, in batches, without their labels."""
    left = settings.images
    for some, _ in dataset.test.in_order(min(settings.batch, left)):
        yield some[:left]
        left -= len(some)
        if left <= 0:
            return


def main(settings: Settings) -> dict:
    launch.one_process()
    storage.check_place(Path(settings.out or "runs") / "analysis.json", "--out")
    a, b, images, name = open_pair(settings)
    if cut_to(a, b)[1] != a.net.config:
        print("note: beside patches these have other tokens: maps are of patches to patches\n")
    out = Path(settings.out or f"runs/analysis-{name}")
    out.mkdir(parents=True, exist_ok=True)
    found = compare(a, b, first_images(images, settings))
    show(found, settings.checkpoints)
    about = {"models": settings.checkpoints, "data": name, "commit": runs.commit()}
    storage.write_text(out / "analysis.json", json.dumps(about | found, indent=1) + "\n")
    draw(found, a, b, images, settings, out)
    print(
        f"\nwrote {out}/analysis.json, maps.png, rollout.png, divergence.png, heads.png and cka.png"
    )
    return about | found


def show(found: dict, names: list[str]) -> None:
    print(f"A {names[0]}\nB {names[1]}\non {found['images']} images\n")
    print("       divergence, nats     entropy, nats   distance, pixels   features")
    print("layer  as is    matched       A       B        A       B       CKA A, B")
    for i, (layer, similar) in enumerate(zip(found["layers"], found["cka"], strict=False)):
        entropies, distances = (
            [np.mean(side) for side in layer[what]] for what in ("entropy", "distance")
        )
        print(
            f"{i + 1:5}  {layer['divergence']:.3f}    {layer['matched']:7.3f}   "
            f"{entropies[0]:5.2f}   {entropies[1]:5.2f}    "
            f"{distances[0]:5.1f}   {distances[1]:5.1f}      {similar[i]:9.2f}"
        )


@torch.no_grad()
def draw(
    found: dict, a: Model, b: Model, dataset: data.Data, settings: Settings, out: Path
) -> None:
    some = next(first_images(dataset, settings))[:6]
    cut, config = cut_to(a, b)
    maps = {
        name: [cut(attention_map(used)) for _, used in model.run(some)]
        for name, model in (("A", a), ("B", b))
    }
    prefix = config.prefix
    which = f"layer {settings.layer}" if settings.layer else "last layer"
    which += f" head {settings.head}" if settings.head else ""
    one_layer = {
        f"{name} {which}": pictures.mean_look(p[settings.layer - 1], prefix, settings.head)
        for name, p in maps.items()
    }
    all_layers = {k: rollout(p)[:, prefix:].mean(1) for k, p in maps.items()}
    drawn = {
        "maps": pictures.overlays(some, one_layer, dataset.normalization, prefix),
        "rollout": pictures.overlays(some, all_layers, dataset.normalization, prefix),
        "divergence": figures.divergences(found["layers"]),
        "heads": figures.heads(found["layers"]),
        "cka": figures.likeness(found["cka"]),
    }
    for name, picture in drawn.items():
        pictures.save(picture, out / f"{name}.png")


if __name__ == "__main__":
    launch.run(main, parse)
