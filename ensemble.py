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
from common import checkpoints, launch
from common.precision import autocast
from common.settings import parse_settings, setting
from datasets.folders import to_nfc
from datasets.sources import CHOICES
from teachers.load import Model, open_model
from train import compute_top1


@dataclass(frozen=True)
class Settings(data.Images):
    checkpoints: tuple[str, ...] = ()
    data: str = setting("", "data set [the checkpoint's]", ("", *data.DATA_SETS))
    image_size: int = 0  # the checkpoint's
    amp: str = setting("auto", "mixed precision", ("auto", "off", "bf16", "fp16"))
    holdout: float = setting(-1.0, "share to score (-1: as trained, 0: all)", low=-1, high=0.9)
    part: str = setting("test", "test (to report) or val (to choose by)", ("test", "val"))
    batch: int = setting(256, "images at a time", low=1)
    json: str = setting("", "file for the results [runs/ensemble-DATA.json]")


parse = partial(
    parse_settings, __doc__, Settings, {}, positional=("checkpoints", "one or more model.pt", 0)
)


def evaluate(paths, settings: Settings) -> dict:
    """Top-1 in per cent of each checkpoint, and of their averaged probabilities."""
    models = [open_model(path, launch.get_device(settings.device)) for path in paths]
    check_images(models, settings)
    settings = choose_images(models[0].checkpoint, settings)
    members: list[dict] = []
    total, labels = torch.zeros(()), torch.zeros(())
    for model in models:
        p, theirs, dataset = compute_probabilities(model, settings)
        if members and not torch.equal(labels, theirs):  # scenes of another size are others
            raise ValueError(f"{model.checkpoint.source} needs other test images than the first")
        total, labels = total + p, theirs
        members.append({
            "checkpoint": model.checkpoint.source,
            "method": model.checkpoint.method,
            "top1": compute_top1(p.argmax(dim=-1), labels),
            "learned_from": dataset.count_learned(model.checkpoint.learned_from, settings.part),
        })  # fmt: skip
    about = {"data": settings.data, "part": settings.part, "images": len(labels)}
    choices = {name: getattr(settings, name) for name in sorted(CHOICES)}
    about["choices"] = {k: v for k, v in choices.items() if v != getattr(Settings, k)}
    together = compute_top1(total.argmax(dim=-1), labels)
    return about | {"members": members, "ensemble_top1": together}


def check_images(models: list[Model], settings: Settings) -> None:
    """ValueError if they were trained for different images, and it is not said which to score."""
    first, *others = (model.checkpoint for model in models)
    for other, name in itertools.product(others, ("data", *CHOICES)):
        asked, own = (one.settings.get(name) for one in (first, other))
        if None not in (asked, own) and asked != own and name not in settings.given:
            said = f"--{name} {own}, the first for {asked}"
            raise ValueError(f"{other.source} is for {said}: name the one to score")


def choose_images(checkpoint: checkpoints.Checkpoint, settings):
    """The settings, with the images that a checkpoint was trained for where none are named."""
    own, name = checkpoint.settings, settings.data or checkpoint.settings.get("data")
    if not name:
        raise ValueError(f"{checkpoint.source} does not say which images it is for: name --data")
    changes = {"data": name, "image_size": checkpoint.architecture["image_size"]}
    for choice in CHOICES.keys() - settings.given:
        changes[choice] = own.get(choice, getattr(settings, choice))
    if settings.holdout < 0:  # the same split, wherever the folder lies now
        changes["holdout"] = own.get("holdout", 0.0) if name == own.get("data") else 0.0
    if name == own.get("data") and not settings.data_dir:
        changes["data_dir"] = own["data_dir"]
    return replace(settings, **changes)


@torch.no_grad()
def compute_probabilities(model: Model, settings) -> tuple[Tensor, Tensor, data.Data]:
    """Class probabilities (images, classes) of a model, labels (images,), and the data set."""
    dataset = load_images(model, settings)
    columns = choose_columns(model, dataset.classes)
    parts, labels = [], []
    mixed = autocast(settings.amp, model.net)
    for batch, theirs in getattr(dataset, settings.part).in_order(settings.batch):
        with mixed:
            logits = model(batch)
        parts.append(logits.float()[:, columns].softmax(dim=-1).cpu())
        labels.append(theirs.cpu())
    return torch.cat(parts), torch.cat(labels), dataset


def load_images(model: Model, settings) -> data.Data:
    """The images at the size and with the normalisation that the model was trained with."""
    size, normalization = model.net.config.image_size, model.checkpoint.normalization
    dataset = data.load(replace(settings, image_size=size), train=False)
    if normalization:
        dataset.normalise.set(normalization)
    return dataset


def choose_columns(model: Model, classes: list[str]) -> list[int]:
    """The model's outputs for these classes, which may be some of its own."""
    outputs = model.net.config.classes
    known = [to_nfc(name) for name in model.checkpoint.classes or classes]
    strange = [name for name in classes if name not in known]
    if strange or len(known) != outputs:
        names = ", ".join(strange[:3]) or f"it has {outputs} outputs"
        odd = f"does not know these {len(classes)} classes ({names})"
        teaches = model.checkpoint.method == "pretrain" or not outputs
        odd = "is no classifier: fine-tune it first" if teaches else odd
        raise ValueError(f"{model.checkpoint.source} {odd}")
    return [known.index(name) for name in classes]


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
    checkpoints.write_text(out, json.dumps(result, indent=1) + "\n")
    print(f"wrote {out}")
    return result


if __name__ == "__main__":
    launch.run(main, parse)
