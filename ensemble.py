"""Evaluates checkpoints of any method, each alone and all together.

Fine-tuning and attention distillation reach the same accuracy in different
ways. Their averaged probabilities are better than either (Li et al., NeurIPS
2024: 85.7 and 85.7 make 86.3). One checkpoint is plain evaluation.

    python ensemble.py runs/finetune-scenes-micro-s0/model.pt \\
        runs/distill-scenes-micro-s0/model.pt
    python ensemble.py model.pt --data-dir /imagenet

The images are those that the first checkpoint was trained for, unless --data or
--data-dir name others.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

import data
import recipes
from common import launch, runs
from common.checkpoints import Checkpoint
from common.hardware import autocast
from common.settings import format_flag, parse_settings, setting
from teachers.classes import match_classes
from teachers.load import Model, open_model
from train import compute_top1


@dataclass(frozen=True)
class Settings(recipes.Images):
    checkpoints: tuple[str, ...] = setting((), "one or more model.pt", low=1)
    data: str = setting("", "data set [the checkpoint's]", ("", *recipes.DATA_SETS))
    image_size: int = setting(0, "pixels per side [the checkpoint's]", high=4096)
    normalization: str = setting("", recipes.NORMALIZATION, ("", *recipes.NORMALIZATIONS))
    amp: str = setting("auto", "mixed precision", ("auto", "off", "bf16", "fp16"))
    holdout: float = setting(-1.0, "validation fraction (-1: as trained)", low=-1, high=0.9)
    part: str = setting("test", "test (to report) or val (to choose by)", ("test", "val"))
    batch: int = setting(256, "images at a time", low=1)


parse = partial(parse_settings, __doc__, Settings, {})


def evaluate(paths, settings: Settings) -> dict:
    """Top-1 in per cent of each checkpoint, and of their averaged probabilities."""
    how = launch.get_device(settings.device), settings.image_size or None, settings.normalization
    models = [open_model(path, *how) for path in paths]
    settings = choose_images(settings, *(model.checkpoint for model in models))
    dataset = data.load(settings, train=False)
    *found, labels = run_models(models, dataset, settings)
    members = [
        {
            "checkpoint": model.checkpoint.source,
            "method": model.checkpoint.method,
            "top1": compute_top1(p.argmax(dim=-1), labels),
            "trained_on": dataset.count_learned(model.checkpoint.learned_from, settings.part),
        }
        for model, p in zip(models, found, strict=True)
    ]
    together = compute_top1(torch.stack(found).sum(dim=0).argmax(dim=-1), labels)
    held = f"--holdout {dataset.holdout}" if dataset.holdout else "test"
    part = held if dataset.val is dataset.test else settings.part
    about = dict(data=settings.data, part=part, images=len(labels), classes=len(dataset.classes))
    return about | {"members": members, "ensemble_top1": together}


def choose_images(settings: Settings, *checkpoints: Checkpoint) -> Settings:
    """The settings, with the images that the first was trained for where none are named.

    ValueError if others were trained for other images, and no flag says which to score.
    """
    first, *others = (
        x.settings | {"image_size": x.architecture["image_size"]} for x in checkpoints
    )
    names = "data image_size scene dial label distractors classes".split()
    changes = {k: first[k] for k in names if k in first and k not in settings.given}
    for (i, other), name in product(enumerate(others, 1), changes):
        if other.get(name, first[name]) != first[name]:
            said = f"{format_flag(name)} {other[name]}, the first for {first[name]}"
            raise ValueError(f"{checkpoints[i].source} is for {said}: name the one to score")
    if not (named := settings.data or first.get("data")):
        raise ValueError(f"{checkpoints[0].source} does not say of which images: name --data")
    same = named == first.get("data")
    if settings.holdout < 0:  # the same split, wherever the folder lies now
        changes["holdout"] = first.get("holdout", 0.0) if same else 0.0
    if same and not settings.data_dir:
        changes["data_dir"] = first["data_dir"]
    return replace(settings, **changes)


@torch.no_grad()
def run_models(models: list[Model], dataset: data.Data, settings: Settings) -> list[Tensor]:
    """Class probabilities (images, classes) of each model, and last the labels (images,)."""
    dataset.check_classes()
    columns = [match_classes(model, dataset.classes) for model in models]
    batches: list[list[Tensor]] = []
    for images, labels in getattr(dataset, settings.part).in_order(settings.batch):
        p = []
        for model, own in zip(models, columns, strict=True):
            with autocast(settings.amp, model.net):
                logits = model(images).float()
            runs.check_finite({f"the sum of {model.checkpoint.source}'s logits": logits.sum()})
            p.append(logits[:, own].softmax(dim=-1).cpu())
        batches.append([*p, labels.cpu()])
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def main(settings: Settings) -> dict:
    launch.require_one_process()
    result = evaluate(settings.checkpoints, settings)
    images = f"{result['images']:,} images of {result['classes']:,} classes"
    print(f"top-1 on {images} ({result['data']}, {result['part']})")
    for member in result["members"]:
        seen = member["trained_on"]
        note = f" ({seen:,} of these images were TRAINED ON)" if seen else ""
        print(f"{member['top1']:7.2f} %{note}  {member['method']:<9} {member['checkpoint']}")
    if len(result["members"]) > 1:
        print(f"{result['ensemble_top1']:7.2f} %  together, probabilities averaged")
    return result


if __name__ == "__main__":
    launch.run(main, parse)
