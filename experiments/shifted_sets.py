"""Evaluates checkpoints on shifted test sets, and by the labels of ImageNet-ReaL.

    python -m experiments.shifted_sets model.pt \\
        --sets /imagenet-a,/imagenet-r,/imagenet-sketch,/imagenet-v2
    python -m experiments.shifted_sets a/model.pt b/model.pt --real real.json

The first set is the images that the first checkpoint was trained for. If a set has
only some of the classes, probabilities are taken over these, as for ImageNet-A.
Folders 0 to 999 are ImageNet's classes in their order, as in ImageNet-V2.
"""

import json
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

import data
import ensemble
from common import checkpoints, launch
from common.settings import parse_settings, setting
from datasets import folders
from teachers.classes import NUMBERS, number_imagenet
from teachers.load import Model, open_model
from train import compute_top1


@dataclass(frozen=True)
class Settings(ensemble.Settings):
    sets: str = setting("", "folders of test images, separated by commas")
    real: str = setting("", "real.json with the labels of ImageNet-ReaL")
    json: str = setting("runs/shifted-sets.json", "file for the results")


WORDS = ("checkpoints", "one or more model.pt", 0)
parse = partial(parse_settings, __doc__, Settings, {}, positional=WORDS)
NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


def score(models: list[Model], settings: Settings) -> dict:
    """Top-1 in per cent of each model and, last, of their averaged probabilities."""
    if settings.data == "folder":
        parts = folders.list_parts(Path(settings.data_dir or "data/folder")).values()
        if {name for part in parts for name in part.classes} <= set(NUMBERS):
            models = [number_classes(model) for model in models]
    found, labels, dataset = ensemble.compute_probabilities(models, settings)
    every = [*found, sum(found)] if len(found) > 1 else found
    for model in models:
        if seen := dataset.count_learned(model.checkpoint.learned_from, settings.part):
            print(f"note: {model.checkpoint.source} was TRAINED ON {seen:,} of these images")
    top1 = [compute_top1(p.argmax(dim=-1), labels) for p in every]
    result = {"images": len(labels), "top1": top1}
    if settings.real:
        result["real_top1"] = [compute_real_top1(p, dataset, settings.real) for p in every]
    return result


def number_classes(model: Model) -> Model:
    """The model with its classes called by their numbers, if they are ImageNet's."""
    names = model.checkpoint.classes or NUMBERS
    checkpoint = replace(model.checkpoint, classes=number_imagenet(names) or names)
    return replace(model, checkpoint=checkpoint)


def compute_real_top1(p: Tensor, dataset: data.Data, path: str) -> float:
    """How often the likeliest class is among the labels of an image (Beyer et al. 2020).

    The file lists the classes of each validation image, in the order of their numbers. Images
    without any are left out. ValueError if the images have other names or classes.
    """
    source = getattr(dataset.test.source, "files", dataset.test.source)
    names = [NAME.fullmatch(Path(name).stem) for name in source.names]
    if len(dataset.classes) != 1000 or not all(names):
        raise ValueError(f"--real {path}: takes ImageNet's validation images, by their names")
    labels = json.loads(Path(path).read_text())
    numbers = [int(one) if one in NUMBERS else i for i, one in enumerate(dataset.classes)]
    known = (labels[int(name[1]) - 1] for name in names)
    pairs = zip(p.argmax(dim=-1).tolist(), known, strict=True)
    right = [numbers[best] in some for best, some in pairs if some]
    return 100 * sum(right) / len(right)


def main(settings: Settings) -> dict:
    launch.require_one_process()
    out = Path(settings.json)
    checkpoints.check_place(out, "--json", ".json")
    device = launch.get_device(settings.device)
    models = [open_model(path, device) for path in settings.checkpoints]
    own = ensemble.choose_images(models[0].checkpoint, settings)
    found = {own.data: score(models, own)}
    for folder in filter(None, settings.sets.split(",")):
        asked = replace(settings, data="folder", data_dir=folder, holdout=0.0, real="")
        found[folder] = score(models, asked)
    names = [*settings.checkpoints, "together"]
    for name, result in found.items():
        for what, values in list(result.items())[1:]:
            print(f"\n{name}: {result['images']:,} images, {what} in %")
            for model, value in zip(names, values, strict=False):
                print(f"{value:7.2f}  {model}")
    out.parent.mkdir(parents=True, exist_ok=True)
    contents = {"checkpoints": settings.checkpoints, "sets": found}
    checkpoints.write_text(out, json.dumps(contents, indent=1) + "\n")
    return found


if __name__ == "__main__":
    launch.run(main, parse)
