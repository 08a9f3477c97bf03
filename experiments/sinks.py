"""Where attention goes that goes nowhere: class token, registers, single patches, of several ViTs.

    python -m experiments.sinks A/model.pt B/model.pt
    python -m experiments.sinks vit_small_patch14_dinov2.lvd142m \\
        vit_small_patch14_reg4_dinov2.lvd142m --data folder --data-dir photos

Many ViTs look, from everywhere, at a few tokens that hold nothing of the image
there (Xiao et al. 2024; Darcet et al. 2024). For each layer, the mean over
heads, queries and images of the share of attention that goes to the class
token, to all registers, and to the patch that is looked at most; and the norm
of the values there, over the mean norm of a patch's: next to 0, looking there
is looking away. Figures for each head are in --out.
"""

import launch

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import checkpoints
import data
import runs
import storage
from attention import Attended, attention_map
from checkpoints import Model
from experiments.analysis import first_images
from settings import OPENING, Setting, Settings, parse_settings
from vit import Config

SETTINGS = OPENING | {
    "images": Setting(200, "how many of the test images", low=1),
    "batch": Setting(50, "images at a time", low=1),
    "out": Setting("runs/sinks.json", "where the figures of each head go"),
}
parse = partial(parse_settings, __doc__, SETTINGS, positional=("checkpoints", "one or more ViTs"))
PLACES = ("class token", "registers", "top patch")


@torch.no_grad()
def sinks(model: Model, batches: Iterable[Tensor]) -> list[dict[str, list[float]]]:
    """Of each layer, for each of PLACES and head: share of attention, and relative norm of values.

    Places that a ViT does not have are left out.
    """
    totals, count = {}, 0
    for images in batches:
        count += len(images)
        for i, (_, attended) in enumerate(model.run(images)):
            for name, value in of_layer(attended, model.net.config).items():
                totals[i, name] = totals.get((i, name), 0) + value.sum(dim=0).double().cpu()
    layers = [{} for _ in model.net.blocks]
    for (i, name), total in totals.items():
        layers[i][name] = (total / count).tolist()
    return layers


def of_layer(attended: Attended, config: Config) -> dict[str, Tensor]:
    """The same of one layer for each image: (B, H)."""
    looked_at = attention_map(attended).mean(dim=2)  # (B, H, N)
    norms = attended.v.norm(dim=-1)
    first, prefix = int(config.class_token), config.prefix
    norms = norms / norms[:, :, prefix:].mean(dim=-1, keepdim=True)
    patches = looked_at[:, :, prefix:]
    most, where = patches.max(dim=-1)
    shares = {"class token": looked_at[:, :, :first].sum(-1)} if first else {}
    values = {"class token": norms[:, :, :first].mean(-1)} if first else {}
    if config.registers:
        shares["registers"] = looked_at[:, :, first:prefix].sum(-1)
        values["registers"] = norms[:, :, first:prefix].mean(-1)
    shares["top patch"] = most
    values["top patch"] = norms[:, :, prefix:].gather(-1, where[..., None])[..., 0]
    return {f"share: {place}": share for place, share in shares.items()} | {
        f"values: {place}": value for place, value in values.items()
    }


def dataset_for(model: Model, settings: Settings, device) -> data.Data:
    asked = model.checkpoint.images(settings)
    dataset = data.load(asked, device, train=False)
    dataset.adopt(model.checkpoint)
    return dataset


def show(name: str, found: dict, tokens: int) -> None:
    layers = found["layers"]
    places = [place for place in PLACES if f"share: {place}" in layers[0]]
    seen = f"{found['images']} images of {found['image_size']} pixels"
    print(f"\n{name}\n{seen}; if all are looked at alike, a token gets {1 / tokens:.4f}")
    print("       share of attention" + " " * (13 * len(places) - 18) + "norm of values")
    print("layer" + 2 * "".join(f"{place:>13}" for place in places))
    for i, layer in enumerate(layers):
        cells = [layer[f"{what}: {p}"] for what in ("share", "values") for p in places]
        print(f"{i + 1:>5}" + "".join(f"{sum(cell) / len(cell):>13.3f}" for cell in cells))


def main(settings: Settings) -> dict:
    launch.one_process()
    storage.check_place(Path(settings.out), "--out", ".json")
    device, found = launch.device(settings.device), {}
    for path in settings.checkpoints:
        model = checkpoints.open_model(path, device, settings.num_heads)
        dataset = dataset_for(model, settings, device)
        found[path] = {
            "images": min(settings.images, len(dataset.test)),
            "image_size": dataset.image_size,
            "layers": sinks(model, first_images(dataset, settings)),
        }
        show(path, found[path], model.net.config.tokens)
    result = {"commit": runs.commit(), "models": found}
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    storage.write_text(out, json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {out}")
    return result


if __name__ == "__main__":
    launch.run(main, parse)
