"""Attention distillation: the student learns to look where the teacher looks.

Li et al., NeurIPS 2024, section 3. The student computes its own attention maps
P_S. A cross-entropy pulls them to the frozen teacher's maps P_T:

    loss = classification + weight * sum over layers of
           mean over images, heads, queries of  - P_T . log P_S

All else the student learns from scratch. After training the teacher is
discarded.

    python attention_distill.py                    digits (weights/digits.pt)
    python attention_distill.py --teacher random --out runs/random       control
    torchrun --nproc_per_node=8 attention_distill.py --data imagenet \\
        --data-dir /imagenet
"""

import launch

from functools import partial
from itertools import zip_longest

import torch.nn.functional as F

import data
import finetune
import runs
import train
from attention_loss import attention_loss
from lending import as_one
from settings import COMMON, TEACHER, TRANSFER, Setting, Settings, change, parse_settings
from teachers import teacher_and_student
from vit import ViT

SETTINGS = change(  # ImageNet: the README of the authors' code, ViT-L: 18 of 24 layers
    COMMON | TEACHER | TRANSFER,
    #             digits cifar imagenet
    layers=       "75%",
    lr=           (8e-3, 1e-3, 8e-4),
    weight_decay= (0.2,  0.05, 0.3),
) | {
    "attention_weight": Setting(3.0, "weight of the attention loss"),
    "until": Setting(0, "epochs after which the teacher is dismissed (0: never)"),
}  # fmt: skip
parse = partial(parse_settings, __doc__, SETTINGS)


def loss(student: ViT, images, labels, teacher, layers, settings: Settings):
    """Student and teacher walk side by side, block by block; in `layers`, maps are compared."""
    mask = student.draw_drop_path_mask(len(images), images.device)
    theirs = teacher.queries_keys(images, layers, mask if settings.share_drops else None)
    attention = divergence = 0.0
    for (x, ours), target in zip_longest(student.run(images, drop_path_mask=mask), theirs):
        if target is not None:
            if settings.heads == "together":  # as the teacher's already are
                ours = as_one(ours, heads=1)
            cross_entropy, entropy = attention_loss(ours, target)
            attention = attention + cross_entropy
            divergence = divergence + cross_entropy.detach() - entropy
    terms = {
        "class": F.cross_entropy(student.classify(x), labels, label_smoothing=settings.smoothing),
        "attention": settings.attention_weight * attention,
    }
    return terms, {"kl": divergence / len(layers)}  # in nats: 0 where the maps agree


def task(settings: Settings, dataset: data.Data | None = None) -> train.Task:
    """Everything that train.fit needs. `dataset`: used instead of what the settings name."""
    if settings.until >= settings.epochs:
        raise ValueError(f"--until {settings.until}: a run of {settings.epochs} epochs ends before")
    teacher, student, layers, dataset, source = teacher_and_student(settings, dataset)
    # As HASTE does, which found that it helps diffusion transformers (Wang et al., NeurIPS 2025).
    later = (settings.until, partial(finetune.loss, settings=settings)) if settings.until else None
    return train.Task(
        "distill",
        student,
        dataset,
        loss=partial(loss, teacher=teacher, layers=layers, settings=settings),
        predict=finetune.predict,
        teacher=source,
        later=later,
    )


def main(settings: Settings) -> dict:
    runs.check(settings, "distill")
    return train.fit(task(settings), settings)


if __name__ == "__main__":
    launch.run(main, parse)
