"""Compares two ViTs: where they look, and what they see.

    python analysis.py runs/pretrain-digits-micro-s0/model.pt runs/distill-digits-micro-s0/model.pt
    python analysis.py A/model.pt B/model.pt --data imagenet --data-dir /imagenet --images 500 --layer 18 --head 3

For each layer: the divergence between the two ViTs' attention maps (heads as they stand, and heads matched as well as can be),
the entropy of each head's maps and how far it looks; and the similarity (CKA) of the features of every pair of layers. A table
on the terminal; in --out analysis.json, and as pictures maps.png, rollout.png, divergence.png, heads.png and cka.png.

Any checkpoint will do: a teacher, a student (one of attention copy looks with its teacher's eyes), or "random" for B.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor

import data
import train
import vit

FLAGS = {k: data.FLAGS[k] for k in ("data", "data_dir", "workers", "memory", "skip_unreadable")} | {
    "images": (200, "how many of the test images to compare on"),
    "batch": (50, "images at a time"),
    "layer": (0, "whose maps to draw, 1 the first (0: the last)"),
    "head": (0, "whose maps to draw, 1 the first (0: the mean of all)"),
    "device": train.FLAGS["device"],
    "out": ("", "folder for the results (empty: runs/analysis-DATA)"),
}
COLOURS = {  # of Okabe and Ito, which colour-blind eyes can tell apart
    "teacher": "#000000", "from scratch": "#999999", "attention copy": "#56B4E9", "attention distillation": "#0072B2",
    "fine-tuning": "#D55E00", "ensemble": "#009E73",
}  # fmt: skip

Seen = tuple[list[vit.QK], list[Tensor]]  # of each block: the (q, k) it looked with, and the features (B, N, D) it made
Eyes = Callable[[Tensor], Seen]  # images -> what is seen


# Where they look ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def watch(net: vit.ViT, images: Tensor, qk: list = ()) -> Seen:
    """What each block of `net` looked with and made of it; `qk` lends it the looks of another ViT."""
    x, looks, features = net.embed(images), [], []
    for i, block in enumerate(net.blocks):
        x, look = block(x, qk[i] if i < len(qk) else None)
        looks.append(look)
        features.append(x)
    return looks, features


def eyes(checkpoint: dict, device) -> tuple[vit.ViT, Eyes]:
    """The ViT of a checkpoint, and how to watch it: a student of attention copy with its teacher's looks."""
    net = vit.load(checkpoint).to(device).eval()
    if "teacher" not in checkpoint:
        return net, lambda images: watch(net, images)
    teacher = vit.load({**checkpoint["teacher"], "source": checkpoint["source"]}).to(device).eval()
    lend = torch.no_grad()(lambda images: teacher.look(images, checkpoint["layers"]))
    return net, lambda images: watch(net, images, lend(images))


def attention_map(qk: vit.QK) -> Tensor:
    """Maps (B, H, N, N): a distribution over keys for each query."""
    q, k = qk
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats of distributions along the last dimension: 0 looks at one token, ln N at all N alike."""
    return torch.special.entr(p).sum(dim=-1)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of distributions along the last dimension: 0 if they are equal, ln 2 if disjoint."""
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def attention_distance(p: Tensor, patch: int) -> Tensor:
    """How far heads look, in pixels (B, H): the mean distance from a query's patch to where it looks (Dosovitskiy et al., D.7).

    `p`: maps (B, H, 1 + n^2, 1 + n^2) over a class token, which is left out here, and a square grid of patches.
    """
    p = p[:, :, 1:, 1:]
    p = p / p.sum(dim=-1, keepdim=True).clamp_min(1e-9)
    side = math.isqrt(p.shape[-1])
    spot = torch.cartesian_prod(*[torch.arange(side, device=p.device) * float(patch)] * 2)
    return (p * torch.cdist(spot, spot)).sum(dim=-1).mean(dim=-1)


def rollout(maps: Iterable[Tensor]) -> Tensor:
    """Where what each token holds at the end came from (B, N, N), by way of all layers (Abnar and Zuidema 2020).

    Each layer passes on half of what a token was (the residual branch) and half of what its heads looked at.
    """
    total = None
    for p in maps:
        mixed = 0.5 * p.mean(dim=1) + 0.5 * torch.eye(p.shape[-1], device=p.device)
        total = mixed if total is None else mixed @ total
    return total


def match(cost: np.ndarray) -> list[int]:
    """The column for each row of a square matrix such that each is taken once and the sum is least: heads to heads.

    Exact, over all subsets of columns: 2^H H steps, fine for the 16 heads of the largest ViT.
    """
    heads = len(cost)
    subsets = np.arange(2**heads)
    size = sum(subsets >> i & 1 for i in range(heads))
    best, last = np.full(2**heads, np.inf), np.zeros(2**heads, dtype=int)  # of the first rows on a subset of columns
    best[0] = 0
    for row in range(heads):
        before = subsets[size == row]
        for column in range(heads):
            free = before[before >> column & 1 == 0]
            after, total = free | 1 << column, best[free] + cost[row, column]
            better = total < best[after]
            best[after[better]], last[after[better]] = total[better], column
    columns, subset = [], 2**heads - 1
    for _ in range(heads):
        columns.append(int(last[subset]))
        subset ^= 1 << columns[-1]
    return columns[::-1]


# What they see --------------------------------------------------------------------------------------------------------------


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of features x (n, D1) and y (n, D2) of the same n images: 1 for a rotation, 0 for no
    relation (Kornblith et al. 2019).

    With the unbiased estimate of HSIC (Song et al. 2012, equation 5): the usual one finds likeness between any two
    representations of more features than images.
    """
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    k, l = (g - g.diag().diag() for g in (x @ x.T, y @ y.T))  # noqa: E741
    return (hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()).item()


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    n = len(k)
    return ((k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ l.sum(0)) / (n - 2)) / (n * (n - 3))


# The comparison ---------------------------------------------------------------------------------------------------------------


def compare(a: Eyes, b: Eyes, batches: Iterable[Tensor], patch: int) -> dict:
    """All figures of the comparison of two ViTs on the same images: means over images and queries.

    layers: of each, `divergence` of the maps, head by head (as they stand) and `matched` (each of a's heads with the one
    of b's that `pairs` names), in nats; `entropy` of a's and b's heads, in nats; `distance` that they look, in pixels.
    cka: a's layers by b's, of the features' mean over patches, which is what the head of a ViT reads.
    """
    sums, features, count = {}, ([], []), 0
    for images in batches:
        count += len(images)
        (looks_a, made_a), (looks_b, made_b) = a(images), b(images)
        for side, made in zip(features, (made_a, made_b), strict=True):
            side.append(torch.stack([reduce(x[:, 1:], "b n d -> b d", "mean") for x in made]).cpu())  # (layers, B, D)
        for i, looks in enumerate(zip(looks_a, looks_b, strict=False)):
            maps = [attention_map(qk) for qk in looks]
            for what, value in {
                "pairs": torch.stack([jensen_shannon(p[:, None], maps[1]).mean(-1).sum(0) for p in maps[0].unbind(1)]),
                "entropy": torch.stack([entropy(p).mean(-1).sum(0) for p in maps]),
                "distance": torch.stack([attention_distance(p, patch).sum(0) for p in maps]),
            }.items():
                sums[i, what] = sums.get((i, what), 0) + value.cpu()
    if count < 4:
        raise ValueError(f"{count} images are too few: the similarity of features needs at least 4")
    x, y = (torch.cat(side, dim=1) for side in features)
    alike = [[cka(one, other) for other in y] for one in x]
    if not np.isfinite(alike).all():
        raise ValueError("features are not finite, or the same for all images: was one of the two ViTs trained to ruin?")
    layers = []
    for i in range(1 + max(i for i, _ in sums)):
        pairs, heads = sums[i, "pairs"] / count, range(len(sums[i, "pairs"]))
        columns = match(pairs.numpy())
        layers.append({"divergence": pairs.diagonal().mean().item(), "by_head": pairs.diagonal().tolist(), "pairs": columns,
                       "matched": pairs[heads, columns].mean().item(), "entropy": (sums[i, "entropy"] / count).tolist(),
                       "distance": (sums[i, "distance"] / count).tolist()})  # fmt: skip
    return {"images": count, "layers": layers, "cka": alike}


# Pictures -------------------------------------------------------------------------------------------------------------------


def figure(rows: int = 1, columns: int = 1, width: float = 5.0, height: float = 3.2, **how):
    """A white figure, also in a dark notebook."""
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), facecolor="white", layout="constrained", **how)


def lines(axis, series: dict[str, list[float]], label: str, title: str) -> None:
    """Curves over layers, one for each name."""
    spare = iter(("#CC79A7", "#E69F00", "#009E73", "#F0E442"))
    for name, values in series.items():
        axis.plot(range(1, len(values) + 1), values, marker="o", label=name, color=COLOURS.get(name) or next(spare))
    axis.set_ylim(bottom=0)
    over_layers(axis, len(values), label, title)


def over_layers(axis, layers: int, label: str, title: str) -> None:
    axis.set(xlabel="layer", ylabel=label, title=title)
    axis.set_xticks(range(1, layers + 1, max(1, layers // 8)))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)


def heat(axis, matrix: list[list[float]], names: tuple[str, str]) -> None:
    """CKA of a's layers (down) and b's (across), as colours from 0 to 1, with figures where there is room."""
    axis.imshow(matrix, vmin=0, vmax=1, cmap="cividis", origin="lower")
    for y, row in enumerate(matrix if len(matrix) <= 6 else []):
        for x, value in enumerate(row):
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.5 else "black", fontsize=8)
    for ticks, length in ((axis.set_xticks, len(matrix[0])), (axis.set_yticks, len(matrix))):
        spots = range(0, length, max(1, length // 8))
        ticks(spots, [i + 1 for i in spots])
    axis.set(xlabel=f"layer of {names[1]}", ylabel=f"layer of {names[0]}")


def overlays(images: Tensor, looks: dict[str, Tensor], normalization):
    """A figure with a row for each image, and a column for each of `looks`: weights (B, 1 + n^2) over tokens, drawn over it.

    Bright is where a ViT looks; each map is scaled to its own maximum, and the class token is left out.
    """
    mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in normalization)
    pixels = rearrange((images * std + mean).clamp(0, 1), "b c h w -> b h w c").cpu()
    whole = (0, pixels.shape[2], pixels.shape[1], 0)
    fig, axes = figure(len(images), 1 + len(looks), 1 + len(looks), len(images) + 0.4, squeeze=False)
    for i, line in enumerate(axes):
        line[0].imshow(pixels[i].expand(-1, -1, 3), extent=whole)
        for axis, weights in zip(line[1:], looks.values(), strict=True):
            side = math.isqrt(weights.shape[1] - 1)
            axis.imshow(pixels[i].mean(-1), cmap="gray", extent=whole, vmin=0, vmax=1)
            axis.imshow(weights[i, 1:].view(side, side).detach().cpu(), cmap="magma", extent=whole, alpha=0.65, vmin=0)
        for axis in line:
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[0], ("image", *looks), strict=True):
        axis.set_title(name.replace(" ", "\n"), fontsize=8)
    return fig


def attended(p: Tensor, head: int = 0) -> Tensor:
    """Where the patches of each image look, on average over them: (B, N), of one head (1 the first) or the mean of all."""
    p = p[:, head - 1 : head] if head else p
    return reduce(p[:, :, 1:], "b h q k -> b k", "mean")


# From the command line -----------------------------------------------------------------------------------------------------


def options(argv: list[str]):
    return train.options(__doc__, {}, FLAGS, argv, positional=("checkpoints", "A and B: two model.pt, or one and 'random'"))


def open_pair(args) -> tuple[Eyes, Eyes, int, data.Data]:
    """The eyes of args.checkpoints, their patch size, and the images both can look at. ValueError if there are none."""
    if len(args.checkpoints) != 2 or args.checkpoints[0] == "random":
        raise ValueError("analysis.py compares two ViTs: name two checkpoints, or one and then 'random'")
    device = train.device(args)
    first = vit.read(args.checkpoints[0])
    net_a, a = eyes(first, device)
    if args.checkpoints[1] == "random":
        torch.manual_seed(0)
        second, net_b = {}, vit.ViT(**net_a.architecture).to(device).eval()
        b = lambda images: watch(net_b, images)  # noqa: E731
    else:
        second = vit.read(args.checkpoints[1])
        net_b, b = eyes(second, device)
    for what in ("image_size", "patch", "channels", "heads"):
        ours, theirs = net_a.architecture[what], net_b.architecture[what]
        if ours != theirs:
            raise ValueError(f"the maps of the two ViTs cannot be compared: their {what} differ ({ours} and {theirs})")
    normalizations = [c["normalization"] for c in (first, second) if c.get("normalization")]
    if any(n != normalizations[0] for n in normalizations):
        raise ValueError("the two ViTs were trained on images that were normalised differently: they cannot see the same ones")
    depth = min(len(net_a.blocks), len(net_b.blocks))
    for name, value, count in (("layer", args.layer, depth), ("head", args.head, net_a.heads)):
        if value > count:
            raise ValueError(f"--{name} {value}: there are {count}")
    args.image_size = net_a.architecture["image_size"]
    images = data.load(args, device, normalizations[0] if normalizations else None, train=False)
    if images.channels != net_a.architecture["channels"]:
        raise ValueError(f"the ViTs take images of {net_a.architecture['channels']} channels, --data {args.data} has "
                         f"{images.channels}")  # fmt: skip
    return a, b, net_a.architecture["patch"], images


def batches(images: data.Data, args):
    """The first args.images of the test images, without their labels."""
    left = args.images
    for some, _ in images.test.plainly(min(args.batch, left)):
        yield some[:left]
        left -= len(some)
        if left <= 0:
            return


def main(args) -> dict:
    a, b, patch, images = open_pair(args)
    out = Path(args.out or f"runs/analysis-{args.data}")
    out.mkdir(parents=True, exist_ok=True)
    found = compare(a, b, batches(images, args), patch)
    show(found, args.checkpoints)
    record = {"models": args.checkpoints, "data": args.data, "commit": train.commit(), **found}
    train.write_text(out / "analysis.json", json.dumps(record, indent=1) + "\n")
    draw(found, a, b, next(batches(images, args))[:6], images.normalization, args, out)
    print(f"\nwrote {out}/analysis.json, maps.png, rollout.png, divergence.png, heads.png and cka.png")
    return record


def show(found: dict, names: list[str]) -> None:
    print(f"A {names[0]}\nB {names[1]}\non {found['images']} images\n")
    print("       divergence, nats     entropy, nats   distance, pixels   features")
    print("layer  as is    matched       A       B        A       B       CKA A, B")
    for i, (layer, similar) in enumerate(zip(found["layers"], found["cka"], strict=False)):
        entropies, distances = ([np.mean(side) for side in layer[what]] for what in ("entropy", "distance"))
        print(f"{i + 1:5}  {layer['divergence']:.3f}    {layer['matched']:7.3f}   {entropies[0]:5.2f}   "
              f"{entropies[1]:5.2f}    {distances[0]:5.1f}   {distances[1]:5.1f}      {similar[i]:9.2f}")  # fmt: skip


def draw(found: dict, a: Eyes, b: Eyes, images: Tensor, normalization, args, out: Path) -> None:
    looks = {name: [attention_map(qk) for qk in see(images)[0]] for name, see in (("A", a), ("B", b))}
    pictures = {
        "maps": overlays(images, {k: attended(maps[args.layer - 1], args.head) for k, maps in looks.items()}, normalization),
        "rollout": overlays(images, {k: rollout(maps)[:, 1:].mean(1) for k, maps in looks.items()}, normalization),
    }
    pictures["divergence"], axis = figure()
    series = {name: [layer[what] for layer in found["layers"]]
              for name, what in (("heads as they stand", "divergence"), ("heads matched", "matched"))}  # fmt: skip
    lines(axis, series, "Jensen-Shannon divergence (nats)", "How differently A and B look")
    pictures["heads"], axes = figure(1, 2, width=8)
    for axis, what, unit in zip(axes, ("entropy", "distance"), ("nats", "pixels"), strict=True):
        for side, (name, colour) in enumerate((("A", "#0072B2"), ("B", "#D55E00"))):
            for i, layer in enumerate(found["layers"]):
                spots = [i + 1 + 0.2 * side - 0.1] * len(layer[what][side])
                axis.scatter(spots, layer[what][side], s=14, color=colour, label=name if i == 0 else None)
        over_layers(axis, len(found["layers"]), f"{what} ({unit})", f"Attention {what} of each head")
    pictures["cka"], axis = figure(width=4.2, height=4)
    heat(axis, found["cka"], ("A", "B"))
    axis.set_title("Likeness of features (linear CKA)")
    import matplotlib.pyplot as plt

    for name, picture in pictures.items():
        picture.savefig(out / f"{name}.png", dpi=160)
        plt.close(picture)


if __name__ == "__main__":
    train.run(main, options)
