"""Evaluates checkpoints of any method, each alone and their probabilities averaged.

Fine-tuning and attention distillation reach the same accuracy in different ways, so together they are better than either
(Li et al., NeurIPS 2024: 85.7 and 85.7 make 86.3). One checkpoint is plain evaluation.

    python ensemble.py runs/finetune-digits-micro-s0/model.pt runs/distill-digits-micro-s0/model.pt
    python ensemble.py runs/distill-imagenet-large-s0/model.pt --data imagenet --data-dir /imagenet
    python ensemble.py runs/distill-imagenet-large-s0/model.pt --data folder --data-dir /imagenet-a

If the folder has only some of the classes of a checkpoint, probabilities are taken over these (as ImageNet-A and -R are
scored). Folders may be --data-dir/val/CLASS/* or just --data-dir/CLASS/*.
"""

import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import attention_copy
import data
import finetune
import train
import vit

FLAGS = {k: data.FLAGS[k] for k in ("data", "data_dir", "workers", "memory", "skip_unreadable")} | {
    "part": ("test", "test or val: which images to evaluate on (the same ones, but for the digits)"),
    "batch": (256, "images at a time"),
    "device": train.FLAGS["device"],
    "amp": train.FLAGS["amp"],
    "json": ("", "where to write the results (empty: runs/ensemble-DATA.json)"),
}


@torch.no_grad()
def probabilities(checkpoint: dict, args, device) -> tuple[Tensor, Tensor, list[str]]:
    """Class probabilities (images, classes) of one checkpoint, the labels (images,), and the classes' names."""
    net = vit.load(checkpoint).to(device).eval()
    predict = finetune.predict
    if "teacher" in checkpoint:  # attention copy looks with its teacher's eyes, also at test time
        teacher = vit.load({**checkpoint["teacher"], "source": checkpoint["source"]}).to(device).eval()
        predict = partial(attention_copy.predict, teacher=teacher, layers=checkpoint["layers"])
    if not net.architecture["classes"]:
        raise ValueError(f"{checkpoint['source']} has no head: fine-tune it, or transfer its attention, before evaluation")
    args.image_size = net.architecture["image_size"]
    images = data.load(args, device, checkpoint.get("normalization"), train=False)
    if images.channels != net.architecture["channels"]:
        raise ValueError(f"{checkpoint['source']} takes images of {net.architecture['channels']} channels, "
                         f"--data {args.data} has {images.channels}")  # fmt: skip

    known = checkpoint.get("classes") or images.classes
    strange = [name for name in images.classes if name not in known]
    if strange or len(known) != net.architecture["classes"]:
        raise ValueError(f"{checkpoint['source']} knows {net.architecture['classes']} classes, and "
                         f"{', '.join(strange[:3]) or 'as many as'} in --data {args.data} ({len(images.classes)} classes) "
                         "are not among them")  # fmt: skip
    columns = torch.tensor([known.index(name) for name in images.classes], device=device)
    parts, labels, mixed = [], [], train.autocast(args, net)
    for batch, theirs in getattr(images, args.part).plainly(args.batch):
        with mixed:
            logits = predict(net, batch)
        parts.append(logits.float()[:, columns].softmax(dim=-1).cpu())
        labels.append(theirs.cpu())
    if not torch.cat(parts).isfinite().all():
        raise ValueError(f"{checkpoint['source']} gives probabilities that are not finite: its weights are ruined")
    return torch.cat(parts), torch.cat(labels), images.classes


def top1(p: Tensor, labels: Tensor) -> float:
    return 100 * (p.argmax(dim=-1) == labels).float().mean().item()


def evaluate(paths: list[str], args) -> dict:
    """Top-1 in per cent of each checkpoint, and of their averaged probabilities."""
    device = train.device(args)
    if args.part not in ("test", "val"):
        raise ValueError(f"--part {args.part}: choose test or val")
    if train.world() > 1:
        raise ValueError("ensemble.py runs in one process: start it with python, not torchrun")
    members, total, first = [], 0, None
    for path in paths:
        checkpoint = vit.read(path)
        p, labels, classes = probabilities(checkpoint, args, device)
        if first not in (None, classes):
            raise ValueError(f"{path} was evaluated on other classes than {paths[0]}")
        first, total = classes, total + p
        members.append({"checkpoint": str(path), "method": checkpoint.get("method", "?"), "top1": top1(p, labels)})
    return {"data": args.data, "part": args.part, "images": len(labels), "members": members,
            "ensemble_top1": top1(total, labels)}  # fmt: skip


def options(argv: list[str]):
    return train.options(__doc__, {}, FLAGS, argv, positional=("checkpoints", "one or more model.pt"))


def main(args) -> dict:
    result = evaluate(args.checkpoints, args)
    print(f"top-1 on {result['images']:,} images of {args.data} ({args.part})")
    for member in result["members"]:
        print(f"{member['top1']:7.2f} %  {member['method']:<9} {member['checkpoint']}")
    if len(result["members"]) > 1:
        print(f"{result['ensemble_top1']:7.2f} %  together, probabilities averaged")
    out = Path(args.json or f"runs/ensemble-{args.data}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    train.write_text(out, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    train.run(main, options)
