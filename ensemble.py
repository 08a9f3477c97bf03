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

import itertools
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import data
import recipes
from common import checkpoints, launch, runs
from common.checkpoints import Checkpoint
from common.precision import autocast
from common.settings import parse_settings, setting
from datasets.sources import CHOICES
from teachers.load import Model, open_model
from train import compute_top1


@dataclass(frozen=True)
class Settings(recipes.Images):
    checkpoints: tuple[str, ...] = ()
    data: str = setting("", "data set [the checkpoint's]", ("", *recipes.DATA_SETS))
    image_size: int = 0  # the checkpoint's
    normalization: str = setting("", recipes.NORMALIZATION, ("", *recipes.NORMALIZATIONS))
    amp: str = setting("auto", "mixed precision", ("auto", "off", "bf16", "fp16"))
    holdout: float = setting(-1.0, "validation fraction (-1: as trained, 0: all)", low=-1, high=0.9)
    part: str = setting("test", "test (to report) or val (to choose by)", ("test", "val"))
    batch: int = setting(256, "images at a time", low=1)
    json: str = setting("", "file for the results [runs/ensemble-DATA.json]")


parse = partial(
    parse_settings, __doc__, Settings, {}, positional=("checkpoints", "one or more model.pt", 0)
)


def evaluate(paths, settings: Settings) -> dict:
    """Top-1 in per cent of each checkpoint, and of their averaged probabilities."""
    device = launch.get_device(settings.device)
    models = [open_model(path, device, normalization=settings.normalization) for path in paths]
    settings = choose_images(settings, *(model.checkpoint for model in models))
    found, labels, dataset = compute_probabilities(models, settings)
    members = [
        {
            "checkpoint": model.checkpoint.source,
            "method": model.checkpoint.method,
            "top1": compute_top1(p.argmax(dim=-1), labels),
            "learned_from": dataset.count_learned(model.checkpoint.learned_from, settings.part),
        }
        for model, p in zip(models, found, strict=True)
    ]
    total = torch.stack(found).sum(dim=0)
    about = {"data": settings.data, "part": settings.part, "images": len(labels)}
    choices = {name: getattr(settings, name) for name in sorted(CHOICES)}
    about["choices"] = {k: v for k, v in choices.items() if v != getattr(Settings, k)}
    together = compute_top1(total.argmax(dim=-1), labels)
    return about | {"members": members, "ensemble_top1": together}


def choose_images(settings: Settings, first: Checkpoint, *others: Checkpoint) -> Settings:
    """The settings, with the images that the first was trained for where none are named.

    ValueError if others were trained for other images, and it is not said which to score.
    """
    own = first.settings
    for other, choice in itertools.product(others, ("data", *CHOICES)):
        asked, theirs = own.get(choice), other.settings.get(choice)
        if None not in (asked, theirs) and asked != theirs and choice not in settings.given:
            said = f"--{choice} {theirs}, the first for {asked}"
            raise ValueError(f"{other.source} is for {said}: name the one to score")
    if not (name := settings.data or own.get("data")):
        raise ValueError(f"{first.source} does not say which images it is for: name --data")
    changes = {"data": name, "image_size": first.architecture["image_size"]}
    for choice in CHOICES.keys() - settings.given:
        changes[choice] = own.get(choice, getattr(settings, choice))
    if settings.holdout < 0:  # the same split, wherever the folder lies now
        changes["holdout"] = own.get("holdout", 0.0) if name == own.get("data") else 0.0
    if name == own.get("data") and not settings.data_dir:
        changes["data_dir"] = own["data_dir"]
    return replace(settings, **changes)


@torch.no_grad()
def compute_probabilities(
    models: list[Model], settings: Settings
) -> tuple[list[Tensor], Tensor, data.Data]:
    """Class probabilities (images, classes) of each model, labels (images,), and the images."""
    sizes = [model.net.config.image_size for model in models]
    found: dict[int, Tensor] = {}
    labels = torch.zeros(0)
    for size in dict.fromkeys(sizes):  # those of one size share a pass over the images
        some = [i for i, own in enumerate(sizes) if own == size]
        dataset = data.load(replace(settings, image_size=size), train=False)
        *p, theirs = run_models([models[i] for i in some], dataset, settings)
        labels = labels if len(labels) else theirs
        if not torch.equal(labels, theirs):  # scenes of another size are others
            source = models[some[0]].checkpoint.source
            raise ValueError(f"{source} needs other test images than the first")
        found |= zip(some, p, strict=True)
    return [found[i] for i in range(len(models))], labels, dataset


def run_models(models: list[Model], dataset: data.Data, settings: Settings) -> list[Tensor]:
    """Class probabilities of models of one image size, and last the labels."""
    from teachers.classes import match_classes  # imports torchvision, which takes seconds

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
    checkpoints.check_place(Path(settings.json or "runs/ensemble.json"), "--json", ".json")
    result = evaluate(settings.checkpoints, settings)
    which = [result["part"], *(f"{name} {value}" for name, value in result["choices"].items())]
    print(f"top-1 on {result['images']:,} images of {result['data']} ({', '.join(which)})")
    for member in result["members"]:
        seen = member["learned_from"]
        note = f" ({seen:,} of these images were TRAINED ON)" if seen else ""
        print(f"{member['top1']:7.2f} %{note}  {member['method']:<9} {member['checkpoint']}")
    if len(result["members"]) > 1:
        print(f"{result['ensemble_top1']:7.2f} %  together, probabilities averaged")
    out = Path(settings.json or f"runs/ensemble-{result['data']}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save(json.dumps(result, indent=1) + "\n", out)
    print(f"wrote {out}")
    return result


if __name__ == "__main__":
    launch.run(main, parse)
