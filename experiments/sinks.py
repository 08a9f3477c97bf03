"""How much attention goes to the class token, to registers and to single patches.

    python -m experiments.sinks A/model.pt B/model.pt
    python -m experiments.sinks vit_small_patch14_dinov2.lvd142m \\
        vit_small_patch14_reg4_dinov2.lvd142m --data folder --data-dir photos

Many ViTs look, from everywhere, at a few tokens that hold nothing of the image
there (Xiao et al. 2024; Darcet et al. 2024). For each layer: the share of
attention that goes to the class token, to all registers, and to the patch that
gets most. And the norm of the values there, relative to the mean patch's: near 0,
nothing is passed on. Means over heads, queries, images. --out has each head.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import ensemble
from common import checkpoints, launch, runs
from common.settings import parse_settings, setting
from experiments.analysis import ImageSettings, pick_images
from experiments.measures import list_prefix
from teachers.load import Model, open_model
from vit import QK


@dataclass(frozen=True)
class Settings(ImageSettings):
    out: str = setting("runs/sinks.json", "file for the figures of each head")


WORDS = ("checkpoints", "one or more ViTs", 0)
parse = partial(parse_settings, __doc__, Settings, {}, positional=WORDS)
PLACES = ("class token", "registers", "top patch")


@torch.no_grad()
def measure_sinks(model: Model, batches: Iterable[Tensor]) -> list[dict[str, list[float]]]:
    """For each layer, place and head: share of attention, relative norm of values."""
    net, count = model.net, 0
    layers = [{} for _ in net.blocks]
    for images in batches:
        count += len(images)
        x = net.embed(images)
        blocks = zip(net.blocks, layers, model.blockwise(images), strict=True)
        for block, sums, (after, qk) in blocks:
            (v,) = block.attn.project(block.norm1(x), slice(2 * net.config.dim, None))
            for name, value in measure_layer(qk, v, *list_prefix(net.config)).items():
                sums[name] = sums.get(name, 0) + value.sum(dim=0).double().cpu()
            x = after
    return [{name: (total / count).tolist() for name, total in sums.items()} for sums in layers]


def measure_layer(qk: QK, v: Tensor, class_tokens: int, registers: int) -> dict[str, Tensor]:
    """The same of one layer for each image: (B, H)."""
    share, norm, prefix = qk.map().mean(dim=2), v.norm(dim=-1), class_tokens + registers
    norm = norm / norm[:, :, prefix:].mean(dim=-1, keepdim=True)
    found, places = {}, {"class token": (0, class_tokens), "registers": (class_tokens, prefix)}
    for place, (first, end) in places.items():
        if end > first:
            found[f"share: {place}"] = share[:, :, first:end].sum(-1)
            found[f"values: {place}"] = norm[:, :, first:end].mean(-1)
    most, where = share[:, :, prefix:].max(dim=-1, keepdim=True)
    found["share: top patch"] = most[..., 0]
    found["values: top patch"] = norm[:, :, prefix:].gather(-1, where)[..., 0]
    return found


def show(name: str, found: dict, tokens: int) -> None:
    layers = found["layers"]
    places = [place for place in PLACES if f"share: {place}" in layers[0]]
    print(f"\n{name}\n{found['images']} images of {found['image_size']} pixels a side")
    print(f"uniform attention would give each token {1 / tokens:.4f}")
    print("       share of attention" + " " * (13 * len(places) - 18) + "norm of values")
    print("layer" + 2 * "".join(f"{place:>13}" for place in places))
    for i, layer in enumerate(layers):
        cells = [layer[f"{what}: {p}"] for what in ("share", "values") for p in places]
        print(f"{i:>5}" + "".join(f"{sum(cell) / len(cell):>13.3f}" for cell in cells))


def main(settings: Settings) -> dict:
    launch.one_process()
    out, found = Path(settings.out), {}
    checkpoints.check_place(out, "--out", ".json")
    for path in settings.checkpoints:
        model = open_model(path, launch.get_device(settings.device))
        asked = ensemble.choose_images(model.checkpoint, settings)
        dataset, config = ensemble.load_images(model, asked), model.net.config
        found[path] = {
            "images": min(settings.images, len(dataset.test)),
            "image_size": dataset.image_size,
            "layers": measure_sinks(model, pick_images(dataset, settings)),
        }
        show(path, found[path], config.num_prefix_tokens + config.grid_size**2)
    result = {"commit": runs.read_commit(), "models": found}
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_text(out, json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {out}")
    return result


if __name__ == "__main__":
    launch.run(main, parse)
