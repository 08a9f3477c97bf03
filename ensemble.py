"""Evaluates checkpoints of any method, each alone and all together.

Fine-tuning and attention distillation reach the same accuracy in different
ways, and their averaged probabilities are better than either (Li et al.,
NeurIPS 2024: 85.7 and 85.7 make 86.3); README has the control. One checkpoint
is plain evaluation.

    python ensemble.py runs/finetune-digits-micro-s0/model.pt \\
        runs/distill-digits-micro-s0/model.pt
    python ensemble.py model.pt --data imagenet --data-dir /imagenet
    python ensemble.py model.pt --data folder --data-dir /imagenet-a

If the folder has only some of the classes of a checkpoint, probabilities are
taken over these (as ImageNet-A and -R are scored). Folders may be
--data-dir/val/CLASS/* or just --data-dir/CLASS/*.
"""

import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import checkpoints
import data
import launch
from checkpoints import Model
from learner import autocast
from settings import HEADS, Setting, Settings, parse_settings, pick

SETTINGS = pick(
    "data", "data_dir", "scraps", "workers", "memory", "skip_unreadable", "device", "amp"
)
SETTINGS |= HEADS | {
    "part": Setting(
        "test", "which images (the same ones, but for the digits)", choices=("test", "val")
    ),
    "batch": Setting(256, "images at a time", low=1),
    "json": Setting("", "where to write the results (empty: runs/ensemble-DATA.json)"),
}
parse = partial(
    parse_settings, __doc__, SETTINGS, positional=("checkpoints", "one or more model.pt")
)


def evaluate(paths: list[str], settings: Settings) -> dict:
    """Top-1 in per cent of each checkpoint, and of their averaged probabilities."""
    if launch.world() > 1:
        raise ValueError("ensemble.py runs in one process: start it with python, not torchrun")
    device = launch.device(settings.device)
    members, total, first = [], 0, None
    for path in paths:
        model = checkpoints.open_model(path, device, settings.heads)
        p, labels, classes = probabilities(model, settings, device)
        if first not in (None, classes):
            raise ValueError(f"{path} was evaluated on other classes than {paths[0]}")
        first, total = classes, total + p
        method = model.checkpoint.method
        members.append({"checkpoint": str(path), "method": method, "top1": top1(p, labels)})
    about = {"data": settings.data, "part": settings.part, "images": len(labels)}
    return about | {"members": members, "ensemble_top1": top1(total, labels)}


@torch.no_grad()
def probabilities(model: Model, settings: Settings, device) -> tuple[Tensor, Tensor, list[str]]:
    """Class probabilities (images, classes) of a model, labels (images,), names of classes."""
    images = images_for(model, settings, device)
    columns = torch.tensor(columns_of(images.classes, model, settings), device=device)
    parts, labels, mixed = [], [], autocast(settings.amp, model.net)
    for batch, theirs in getattr(images, settings.part).in_order(settings.batch):
        with mixed:
            logits = model(batch)
        parts.append(logits.float()[:, columns].softmax(dim=-1).cpu())
        labels.append(theirs.cpu())
    if not torch.cat(parts).isfinite().all():
        source = model.checkpoint.source
        raise ValueError(
            f"{source} gives probabilities that are not finite: its weights are ruined"
        )
    return torch.cat(parts), torch.cat(labels), images.classes


def images_for(model: Model, settings: Settings, device) -> data.Data:
    """The test images at the size and with the normalisation that the model was trained with."""
    architecture, source = model.net.architecture, model.checkpoint.source
    if not architecture["classes"]:
        raise ValueError(
            f"{source} has no head: fine-tune it, or transfer its attention, before evaluation"
        )
    settings = settings.but(image_size=architecture["image_size"])
    images = data.load(settings, device, model.checkpoint.normalization, train=False)
    if images.channels != architecture["channels"]:
        raise ValueError(
            f"{source} takes images of {architecture['channels']} channels, "
            f"--data {settings.data} has {images.channels}"
        )
    return images


def columns_of(classes: list[str], model: Model, settings: Settings) -> list[int]:
    """Which of the model's outputs are these classes."""
    known, outputs = model.checkpoint.classes or classes, model.net.architecture["classes"]
    source = model.checkpoint.source
    if len(known) != outputs:
        raise ValueError(
            f"{source} has {outputs} outputs, but --data {settings.data} {len(known)} classes"
        )
    strange = [name for name in classes if name not in known]
    if strange:
        few = ", ".join(strange[:3])
        raise ValueError(
            f"{source} does not know {few} of --data {settings.data} ({len(classes)} classes)"
        )
    return [known.index(name) for name in classes]


def top1(p: Tensor, labels: Tensor) -> float:
    return 100 * (p.argmax(dim=-1) == labels).float().mean().item()


def main(settings: Settings) -> dict:
    result = evaluate(settings.checkpoints, settings)
    print(f"top-1 on {result['images']:,} images of {settings.data} ({settings.part})")
    for member in result["members"]:
        print(f"{member['top1']:7.2f} %  {member['method']:<9} {member['checkpoint']}")
    if len(result["members"]) > 1:
        print(f"{result['ensemble_top1']:7.2f} %  together, probabilities averaged")
    out = Path(settings.json or f"runs/ensemble-{settings.data}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_text(out, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    launch.run(main, parse)
