"""Compares two ViTs: where they look, and how similar their features are.

    python -m experiments.analysis A/model.pt B/model.pt
    python -m experiments.analysis A/model.pt random --images 500
    python -m experiments.analysis A/model.pt B/model.pt --data imagenet \\
        --data-dir /imagenet --layer 17 --head 2

For each layer: how far the maps of both are apart, head by head and with heads
matched; the entropy of the maps and how far they look; the similarity (CKA) of
the features. Any checkpoint will do, and B may be "random".
"""

import sys

if not __package__:
    sys.exit("error: run it as a module: python -m experiments.analysis")

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import look
from common import checkpoints, launch, pictures, runs
from common.augment import hash_seed
from common.settings import parse_settings, setting
from ensemble import choose_images
from experiments import figures
from experiments.measures import choose_cut, compare
from teachers.load import Model, build, open_model, read_checkpoint


@dataclass(frozen=True)
class ImageSettings(data.Images):
    checkpoints: tuple[str, ...] = ()
    image_size: int = 0  # the checkpoint's
    data: str = setting("", "data set [the checkpoint's]", ("", *data.DATA_SETS))
    images: int = setting(200, "how many test images, evenly spaced in a folder", low=4)
    batch: int = setting(50, "images at a time", low=1)


@dataclass(frozen=True)
class Settings(ImageSettings):
    layer: int = setting(-1, "layer whose maps to draw, 0 the first [the last]", low=-1)
    head: int = setting(-1, "head whose maps to draw, 0 the first [the mean of all]", low=-1)
    out: str = setting("", "folder for the results [runs/analysis-DATA]")


WORDS = ("checkpoints", "A and B: two checkpoints, or one and 'random'", 2)
parse = partial(parse_settings, __doc__, Settings, {}, positional=WORDS)


def open_pair(settings: Settings) -> tuple[Model, Model, data.Data, str]:
    """The two models, the images that both can see, and their data set's name.

    A public model sees images of the other one's size. ValueError if they cannot be compared.
    """
    device = launch.get_device(settings.device)
    files = [read_checkpoint(name) for name in settings.checkpoints if name != "random"]
    trained = next((file for file in files if file.settings), files[0])
    size = trained.architecture["image_size"]
    models = [open_model(file, device, None if file.settings else size) for file in files]
    if len(models) == 1:
        torch.manual_seed(hash_seed("random net"))  # no training begins like this
        models.append(Model(build(models[0].net.config).to(device).eval()))
    a, b = models
    for what in ("image_size", "patch", "channels", "heads"):
        ours, theirs = (getattr(model.net.config, what) for model in models)
        if ours != theirs:
            raise ValueError(f"their maps cannot be compared: {what} differ ({ours}, {theirs})")
    depth = min(len(a.net.blocks), len(b.net.blocks))
    for name, count in (("layer", depth), ("head", a.net.config.heads)):
        if getattr(settings, name) >= count:
            raise ValueError(f"--{name} {getattr(settings, name)}: there are 0 to {count - 1}")
    settings = choose_images(trained, settings)
    dataset = data.load(settings, train=False)
    return a, b, dataset, settings.data


def pick_images(dataset: data.Data, settings: ImageSettings) -> Iterator[Tensor]:
    """--images of the test images, in batches.

    Every k-th of a folder, which is sorted by class. The first of a bundled or downloaded set.
    """
    source, count = dataset.test.source, min(settings.images, len(dataset.test))
    in_files = getattr(source, "files", source)
    step = len(source) // count if in_files else 1
    some = source.subset(list(range(0, step * count, step)))
    view = data.Eval(some, dataset.test.device)
    return (images for images, _ in view.in_order(settings.batch))


def main(settings: Settings) -> dict:
    launch.require_one_process()
    checkpoints.check_place(Path(settings.out or "runs") / "analysis.json", "--out", ".json")
    a, b, dataset, name = open_pair(settings)
    found = compare(a, b, pick_images(dataset, settings))
    show(found, settings.checkpoints)
    found = {"models": settings.checkpoints, "data": name, "commit": runs.read_commit()} | found
    out = Path(settings.out or f"runs/analysis-{name}")
    out.mkdir(parents=True, exist_ok=True)
    checkpoints.write_text(out / "analysis.json", json.dumps(found, indent=1) + "\n")
    draw(found, a, b, dataset, settings, out)
    print(f"\nwrote {out}/analysis.json, maps.png, layers.png, cka.png")
    return found


def show(found: dict, names: list[str]) -> None:
    print(f"A {names[0]}\nB {names[1]}\non {found['images']} images\n")
    print("       divergence, nats     entropy, nats   distance, pixels   features")
    print("layer  as is    matched       A       B        A       B       CKA A, B")
    for i, (layer, similar) in enumerate(zip(found["layers"], found["cka"], strict=False)):
        a, b = np.mean(layer["entropy"], axis=1)
        line = f"{i:5}  {layer['divergence']:.3f}    {layer['matched']:7.3f}   {a:5.2f}   {b:5.2f}"
        a, b = np.mean(layer["distance"], axis=1)
        print(f"{line}    {a:5.1f}   {b:5.1f}      {similar[i]:9.2f}")


@torch.no_grad()
def draw(found: dict, a: Model, b: Model, dataset: data.Data, settings: Settings, out: Path):
    some = next(pick_images(dataset, replace(settings, images=6, batch=6)))
    cut, patches = choose_cut(a, b), a.net.config.grid_size**2
    which = "last layer" if settings.layer < 0 else f"layer {settings.layer}"
    head = None if settings.head < 0 else settings.head
    which += "" if head is None else f" head {head}"
    one_layer = {}
    for name, model in (("A", a), ("B", b)):
        p = [cut(qk.map()) for _, qk in model.blockwise(some)][settings.layer]
        prefix = p.shape[-1] - patches
        one_layer[f"{name} {which}"] = look.mean_look(p, prefix, head)
    title = "Where all patches look ({data}). A: {models[0]}, B: {models[1]}".format(**found)
    overlays = look.draw_overlays(some, one_layer, prefix, title=title)
    pictures.save(overlays, out / "maps.png")
    pictures.save(figures.draw_layers(found["layers"]), out / "layers.png")
    pictures.save(figures.draw_similarity(found["cka"]), out / "cka.png")


if __name__ == "__main__":
    launch.run(main, parse)
