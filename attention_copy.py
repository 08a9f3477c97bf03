"""Attention copy: the student looks where the teacher looks.

Li et al., NeurIPS 2024, section 3. The frozen teacher runs beside the student,
which uses the teacher's attention maps instead of its own:

    student:  y = softmax(q_T @ k_T.mT / sqrt(d)) @ v_S   T: teacher, S: student

All else (values, MLPs, embeddings, head) the student learns from scratch. The
teacher is needed at test time too.

    python attention_copy.py                       digits (weights/digits.pt)
    python attention_copy.py --teacher random --out runs/random-copy     control
    torchrun --nproc_per_node=8 attention_copy.py --data imagenet \\
        --data-dir /imagenet
"""

import launch

from functools import partial

import torch.nn.functional as F
from torch import Tensor

import checkpoints
import data
import runs
import train
from settings import COMMON, TEACHER, TRANSFER, Settings, change, parse_settings
from teachers import teacher_and_student
from vit import ViT

SETTINGS = change(  # ImageNet: the README of the authors' code, ViT-L
    COMMON | TEACHER | TRANSFER,
    #             digits cifar imagenet
    epochs=       (450,  100,  100),
    warmup=       (45,   5,    5),
    lr=           (4e-3, 1e-3, 8e-3),
    min_lr=       (0.0,  1e-6, 2e-3),
    weight_decay= (0.2,  0.05, 0.05),
    beta2=        0.999,
    layer_decay=  (1.0,  1.0,  0.75),
    drop_path=    (0.0,  0.1,  0.0),
)  # fmt: skip
parse = partial(parse_settings, __doc__, SETTINGS)


def predict(student: ViT, images, teacher, layers, share_drops: bool = True) -> Tensor:
    """Logits of a student that attends with the teacher's maps in `layers`, else with its own."""
    mask = student.draw_drop_path_mask(len(images), images.device)  # None in evaluation
    theirs = teacher.queries_keys(images, layers, mask if share_drops else None)
    return student(images, given=theirs, drop_path_mask=mask)


def loss(student: ViT, images, labels, teacher, layers, settings: Settings):
    logits = predict(student, images, teacher, layers, settings.share_drops)
    return {"class": F.cross_entropy(logits, labels, label_smoothing=settings.smoothing)}, {}


def task(settings: Settings, dataset: data.Data | None = None) -> train.Task:
    """Everything that train.fit needs. `dataset`: used instead of what the settings name."""
    teacher, student, layers, dataset, source = teacher_and_student(settings, dataset)
    for i in layers:
        if student.blocks[i].attn.relative:  # its own maps are unused: no gradient
            student.blocks[i].attn.relative.requires_grad_(False)
    return train.Task(
        "copy",
        student,
        dataset,
        loss=partial(loss, teacher=teacher, layers=layers, settings=settings),
        predict=partial(predict, teacher=teacher, layers=layers),
        export=partial(checkpoints.export, teacher=teacher, layers=layers),
        teacher=source,
    )


def main(settings: Settings) -> dict:
    runs.check(settings, "copy")
    return train.fit(task(settings), settings)


if __name__ == "__main__":
    launch.run(main, parse)
