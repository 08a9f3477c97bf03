"""Compares two ViTs: where they look, and how similar their features are.

    python -m study.analysis A/model.pt B/model.pt
    python -m study.analysis A/model.pt random --images 500
    python -m study.analysis A.pt B.pt --data imagenet --data-dir /imagenet

For each layer: how far the maps of both are apart, head by head; their entropy;
the similarity (CKA) of the features. Any checkpoint will do, B may be "random".
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import data
import recipes
from common import launch
from common.augment import hash_seed
from common.settings import parse_settings, setting
from ensemble import choose_images
from teachers.load import Model, build, open_model, read_checkpoint


@dataclass(frozen=True)
class Settings(recipes.Images):
    checkpoints: tuple[str, ...] = ()
    image_size: int = 0  # the checkpoint's
    data: str = setting("", "data set [the checkpoint's]", ("", *recipes.DATA_SETS))
    images: int = setting(200, "how many test images, evenly spaced", low=4)


WORDS = ("checkpoints", "A and B: two checkpoints, or one and 'random'", 2)
parse = partial(parse_settings, __doc__, Settings, {}, positional=WORDS)
AT_A_TIME = 50  # images


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


@torch.no_grad()
def compare(a: Model, b: Model, batches: Iterable[Tensor]) -> list[dict]:
    """Of each layer: `divergence` of the maps and `entropy` of both, in nats; `cka` of features.

    Maps are means over images, heads and queries, features over patches. Where one of the two has
    other tokens besides, maps are compared over the patches.
    """
    patches, sums, features = a.net.config.grid_size**2, [], []
    differ = a.net.config.num_prefix_tokens != b.net.config.num_prefix_tokens
    for images in batches:
        of_batch, means = [], []
        for pair in zip(a.blockwise(images), b.blockwise(images), strict=False):
            p, q = (qk.map() for _, qk in pair)
            if differ:
                p, q = (m[..., -patches:, -patches:] for m in (p, q))
                p, q = (m / m.sum(dim=-1, keepdim=True) for m in (p, q))
            found = jensen_shannon(p, q), entropy(p), entropy(q)
            of_batch.append([value.mean().item() * len(images) for value in found])
            means.append([x[:, -patches:].mean(dim=1).cpu() for x, _ in pair])
        sums.append(of_batch)
        features.append(means)
    layers = []
    for of_layer, pairs in zip(torch.tensor(sums).sum(0), zip(*features, strict=True), strict=True):
        x, y = (torch.cat(side) for side in zip(*pairs, strict=True))
        divergence, *entropies = (of_layer / len(x)).tolist()
        layers.append({"divergence": divergence, "entropy": entropies, "cka": cka(x, y)})
    return layers


def main(settings: Settings) -> list[dict]:
    launch.require_one_process()
    device = launch.get_device(settings.device)
    files = [read_checkpoint(name) for name in settings.checkpoints if name != "random"]
    trained = next((file for file in files if file.settings), files[0])  # whose images both see
    size = trained.architecture["image_size"]
    models = [open_model(file, device, None if file.settings else size) for file in files]
    if len(models) == 1:
        torch.manual_seed(hash_seed("random net"))  # no training begins like this
        models.append(Model(build(models[0].net.config).to(device).eval()))
    for what in ("image_size", "patch", "channels", "heads"):
        ours, theirs = (getattr(model.net.config, what) for model in models)
        if ours != theirs:
            raise ValueError(f"their maps cannot be compared: {what} differ ({ours}, {theirs})")
    dataset = data.load(choose_images(trained, settings), train=False)
    source, count = dataset.test.source, min(settings.images, len(dataset.test))
    some = source.subset([i * len(source) // count for i in range(count)])
    view = data.Eval(some, device)
    layers = compare(*models, (images for images, _ in view.in_order(AT_A_TIME)))
    print("A {}\nB {}\n".format(*settings.checkpoints))
    print("layer  divergence, nats  entropy of A     of B  CKA of features")
    for i, layer in enumerate(layers):
        line = f"{i:5}  {layer['divergence']:16.3f}  {layer['entropy'][0]:12.2f}"
        print(f"{line}  {layer['entropy'][1]:7.2f}  {layer['cka']:15.2f}")
    return layers


if __name__ == "__main__":
    launch.run(main, parse)
