"""Attention copy: the student looks where the teacher looks (Li et al., NeurIPS 2024, section 3).

The frozen teacher runs beside the student, which uses the teacher's attention maps instead of its own:

    student:  y = softmax(q_T k_T' / sqrt(d)) v_S          # map of the teacher, values of the student

All else (values, MLPs, embeddings, head) the student learns from scratch. The teacher is needed at test time too.

    python attention_copy.py                             digits, from a teacher pre-trained here first if need be
    python attention_copy.py --teacher random            the control: maps that nobody learned
    torchrun --nproc_per_node=8 attention_copy.py --data imagenet --data-dir /imagenet --micro-batch 64
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import pretrain
import train
import vit

RECIPE = {  # ImageNet: the README of the authors' code, ViT-L
    # name            digits   cifar   imagenet
    "model":         ("micro", "tiny", "large"),
    "patch":         (3,       4,      16),
    "teacher":       ("auto",  "auto", "auto"),
    "layers":        ("3",     "all",  "all", "whose maps are copied: a count (18), range (6-11), list (0,2,4-7) or all"),
    "labels":        (100,     0,      0),
    "epochs":        (450,     100,    100),
    "warmup":        (45,      5,      5),
    "batch":         (50,      512,    2048),
    "lr":            (4e-3,    1e-3,   8e-3),
    "min_lr":        (0.0,     1e-6,   2e-3),
    "weight_decay":  (0.05,    0.05,   0.05),
    "beta2":         (0.999,   0.999,  0.999),
    "layer_decay":   (1.0,     1.0,    0.75),
    "clip":          (1.0,     1.0,    0.0),
    "ema":           (0.0,     0.999,  0.9999),
    "drop_path":     (0.0,     0.1,    0.0),
    "share_drops":   (True,    True,   True, "drop path drops the same branches in teacher and student"),
    "crop_area":     (0.0,     0.0,    0.08),
    "randaugment":   (0,       0,      9),
    "erase":         (0.0,     0.25,   0.25),
    "mixup":         (0.0,     0.8,    0.8),
    "cutmix":        (0.0,     1.0,    1.0),
    "smoothing":     (0.0,     0.1,    0.1),
    "eval_every":    (45,      1,      1),
}  # fmt: skip
FLAGS = data.FLAGS | train.FLAGS


# The method ---------------------------------------------------------------------------------------------------------------


def predict(student: vit.ViT, images: Tensor, teacher: vit.ViT, layers: Sequence[int], share_drops: bool = True) -> Tensor:
    """Logits of a student that looks where the teacher looks in `layers`, and where it likes in the others."""
    keep = student.draw_keep(len(images), images.device)  # drop path; None in evaluation
    with torch.no_grad():
        qk = teacher.look(images, layers, keep if share_drops else None)
    return student(images, qk, keep)[0]


def loss(student: vit.ViT, images: Tensor, labels: Tensor, teacher: vit.ViT, layers: Sequence[int], args) -> dict[str, Tensor]:
    logits = predict(student, images, teacher, layers, args.share_drops)
    return {"class": F.cross_entropy(logits, labels, label_smoothing=args.smoothing)}


# From the command line to train.fit ---------------------------------------------------------------------------------------


def pair(args, device) -> tuple[vit.ViT, vit.ViT, list[int], data.Data]:
    """A randomly initialised student, a frozen teacher, the layers to transfer, and images normalised for the teacher."""
    checkpoint = pretrain.teacher(args)
    if args.teacher == "none":
        raise ValueError("--teacher none: there is nothing to transfer without a teacher (finetune.py trains from scratch)")
    images = data.load(args, device, checkpoint and checkpoint.get("normalization"))
    shape = dict(image_size=images.image_size, patch=args.patch, channels=images.channels, classes=len(images.classes))
    torch.manual_seed(args.seed)
    student = vit.build(args.model, **shape, drop_path=args.drop_path)
    teacher = vit.load(checkpoint, image_size=images.image_size) if checkpoint else vit.build(args.model, **shape)
    layers = vit.parse_layers(args.layers, len(student.blocks))
    vit.check_loan(teacher, student, layers)
    return student.to(device), teacher.to(device).eval().requires_grad_(False), layers, images


def options(argv: list[str]):
    return train.options(__doc__, RECIPE, FLAGS, argv)


def main(args) -> dict:
    student, teacher, layers, images = pair(args, train.device(args))

    def card(student: vit.ViT) -> dict:
        lender = {"model": teacher.state_dict(), "architecture": teacher.architecture}
        return {"model": student.state_dict(), "architecture": student.architecture, "classes": images.classes,
                "normalization": images.normalization, "method": "copy", "teacher": lender, "layers": layers}  # fmt: skip

    return train.fit(student, lambda *step: loss(*step, teacher, layers, args),
                     lambda *batch: predict(*batch, teacher, layers), images, args, "copy", card)  # fmt: skip


if __name__ == "__main__":
    train.run(main, options)
