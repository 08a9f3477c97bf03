"""Attention copy: the student looks where the teacher looks.

Li et al., NeurIPS 2024, section 3. The frozen teacher runs beside the student,
which uses the teacher's attention maps instead of its own:

    student:  y = softmax(q_T @ k_T.mT / sqrt(d)) @ v_S   T: teacher, S: student

The student learns everything else from scratch: values, MLPs, embeddings,
head. It needs the teacher at test time too.

    python attention_copy.py                       scenes (weights/scenes.pt)
    python attention_copy.py --teacher random --out runs/random-copy
"""

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

import data
import recipes
import train
from common import checkpoints, launch
from common.settings import merge_recipes, parse_settings
from teachers.find import Teacher, find_teacher, make_pair
from vit import ViT


@dataclass(frozen=True)
class Settings(recipes.TransferSettings):
    method = "copy"


RECIPES = merge_recipes(
    recipes.RECIPES,
    scenes=dict(epochs=300, blr=0.128, weight_decay=0.05, mixup=0.8),  # 92.3 (scenes-steps)
    digits=dict(epochs=450, blr=0.02048, weight_decay=0.2, layers=":3"),  # 83.3 (fair-main)
    cifar=dict(epochs=25, blr=2.56e-3),  # 60.2 (why-cifar10)
    cifar_gpu=dict(epochs=100, blr=5e-4, weight_decay=0.05),  # not measured
    imagenet=dict(  # the authors' README, ViT-L: 85.1 in the paper, not run here
        epochs=100, warmup=0.05, blr=1e-3, final_lr=0.25, weight_decay=0.05, beta2=0.999,
        layer_decay=0.75, drop_path=0.0,
    ),
)  # fmt: skip
parse = partial(parse_settings, __doc__, Settings, RECIPES)


def predict(student: ViT, images: Tensor, teacher: Teacher, layers: list[int]) -> Tensor:
    """Logits of a student that attends with the teacher's maps in `layers`, else with its own."""
    factors = student.draw_drop_path(len(images))  # both drop the same branches, as the authors do
    theirs = teacher.lend(images, layers, factors)
    return student(images, given=theirs, factors=factors)


def loss(student: ViT, images, labels, teacher: Teacher, layers: list[int], smoothing: float):
    logits = predict(student, images, teacher, layers)
    return F.cross_entropy(logits, labels, label_smoothing=smoothing), {}


def task(settings: Settings, dataset: data.Data, checkpoint=None) -> train.Task:
    teacher, student, layers = make_pair(settings, dataset, checkpoint)  # the teacher is frozen
    return train.Task(
        student,
        dataset,
        loss=partial(loss, teacher=teacher, layers=layers, smoothing=settings.smoothing),
        predict=partial(predict, teacher=teacher, layers=layers),
        export=partial(checkpoints.export, teacher=teacher, layers=layers),
        checkpoint=checkpoint,
    )


def main(settings: Settings) -> dict:
    dataset = data.load(settings)
    checkpoint = find_teacher(settings, dataset)
    return train.fit(task(settings, dataset, checkpoint), settings)


if __name__ == "__main__":
    launch.run(main, parse)
