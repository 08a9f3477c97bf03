"""Measures of attention maps and features, and the comparison of two ViTs by them."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

# Where they look ----------------------------------------------------------------------------------


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats along the last dimension: from 0 (one token) to ln N (uniform)."""
    return torch.special.entr(p).sum(dim=-1)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats along the last dimension: 0 if equal, ln 2 if disjoint."""
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def attention_distance(p: Tensor, grid: int, patch: int) -> Tensor:
    """The mean distance in pixels from a query's patch to where it looks: (B, H).

    `p`: maps (B, H, N, N) whose last grid^2 tokens are patches. Other tokens are left out
    (Dosovitskiy et al. 2021, D.7).
    """
    p = renormalise(p[:, :, -(grid**2) :, -(grid**2) :])
    axis = torch.arange(grid, device=p.device) * float(patch)
    places = torch.cartesian_prod(axis, axis)
    return (p * torch.cdist(places, places)).sum(dim=-1).mean(dim=-1)


def renormalise(p: Tensor) -> Tensor:
    return p / p.sum(dim=-1, keepdim=True).clamp_min(1e-9)


def match(cost: np.ndarray) -> list[int]:
    """A column for each row of a square matrix, all different, with the least sum.

    The Hungarian method (Jonker and Volgenant 1987): rows enter one by one, along shortest paths.
    """
    n = len(cost)
    of_rows, of_columns = np.zeros(n), np.zeros(n + 1)  # prices
    row_of = np.full(n + 1, -1)  # column n stands for the row that enters
    for entering in range(n):
        least, before = np.full(n, np.inf), np.full(n, n)
        done, column, row_of[n] = np.zeros(n + 1, bool), n, entering
        while row_of[column] >= 0:
            done[column] = True
            row = row_of[column]
            reduced = cost[row] - of_rows[row] - of_columns[:n]
            better = ~done[:n] & (reduced < least)
            least[better], before[better] = reduced[better], column
            column = int(np.where(done[:n], np.inf, least).argmin())
            step = least[column]
            of_rows[row_of[done]] += step
            of_columns[done] -= step
            least[~done[:n]] -= step
        while column != n:
            row_of[column] = row_of[before[column]]
            column = before[column]
    return row_of[:n].argsort().tolist()


# What they see ------------------------------------------------------------------------------------


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


# The comparison -----------------------------------------------------------------------------------


@torch.no_grad()
def compare(a, b, batches: Iterable[Tensor]) -> dict:
    """Compares two teachers.load.Model on the same images. Means over images and queries.

    layers: `divergence` of the maps, head by head, and `matched` (a's heads with those of b that
    `pairs` names), `entropy` of a's and b's heads, all in nats; `distance` they look, in pixels.
    cka: a's layers by b's, of the features' mean over patches.
    """
    sums, features, count = {}, ([], []), 0
    cut = choose_cut(a, b)
    for images in batches:
        count += len(images)
        traces = [list(model.blockwise(images)) for model in (a, b)]
        for side, trace, model in zip(features, traces, (a, b), strict=True):
            prefix = model.net.config.num_prefix_tokens
            means = [x[:, prefix:].mean(dim=1) for x, _ in trace]
            side.append(torch.stack(means).cpu())  # (layers, B, D)
        for i, pair in enumerate(zip(*traces, strict=False)):
            p, q = (cut(qk.map()) for _, qk in pair)
            for what, value in compare_maps(p, q, a.net.config).items():
                sums[i, what] = sums.get((i, what), 0) + value.cpu()
    x, y = (torch.cat(side, dim=1) for side in features)
    layers = [
        summarise_layer(*(sums[i, what] / count for what in ("pairs", "entropy", "distance")))
        for i in range(1 + max(i for i, _ in sums))
    ]
    similar = [[cka(one, other) for other in y] for one in x]
    return {"images": count, "layers": layers, "cka": similar}


def choose_cut(a, b) -> Callable[[Tensor], Tensor]:
    """Makes the maps of both comparable: whole if both have the same tokens, else of patches."""
    if list_prefix(a.net.config) == list_prefix(b.net.config):
        return lambda p: p
    patches = a.net.config.grid_size**2
    return lambda p: renormalise(p[..., -patches:, -patches:])


def list_prefix(config) -> tuple[int, int]:
    registers = getattr(config, "registers", 0)
    return config.num_prefix_tokens - registers, registers  # class tokens, registers


def compare_maps(p: Tensor, q: Tensor, config) -> dict[str, Tensor]:
    """Sums over images: divergence of each pair of heads (H, H); entropy, distance (2, H)."""
    pairs = [jensen_shannon(head[:, None], q).mean(-1).sum(0) for head in p.unbind(1)]
    shape = config.grid_size, config.patch
    return {
        "pairs": torch.stack(pairs),
        "entropy": torch.stack([entropy(side).mean(-1).sum(0) for side in (p, q)]),
        "distance": torch.stack([attention_distance(side, *shape).sum(0) for side in (p, q)]),
    }


def summarise_layer(pairs: Tensor, entropies: Tensor, distances: Tensor) -> dict:
    columns = match(pairs.numpy())
    matched, by_head = pairs[range(len(pairs)), columns].mean().item(), pairs.diagonal()
    found = dict(divergence=by_head.mean().item(), by_head=by_head.tolist(), pairs=columns)
    return found | dict(matched=matched, entropy=entropies.tolist(), distance=distances.tolist())
