"""Attention distillation: the student learns to look where the teacher looks.

Li et al., NeurIPS 2024, section 3. The student computes its own attention maps
P_S. A cross-entropy pulls them to the frozen teacher's maps P_T:

    loss = classification + weight * sum over layers of
           mean over images, heads, queries of  - P_T . log P_S

The student learns everything else from scratch. After training the teacher is
discarded.

    python attention_distill.py                    scenes (weights/scenes.pt)
    python attention_distill.py --teacher random --out runs/random
    torchrun --nproc_per_node=8 attention_distill.py --data imagenet \\
        --data-dir /imagenet
"""

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

import data
import recipes
import train
from common import launch
from common.attention import compare_maps
from common.settings import merge_recipes, parse_settings, setting
from teachers.find import Teacher, find_teacher, make_pair
from vit import QK, ViT


@dataclass(frozen=True)
class Settings(recipes.TransferSettings):
    method = "distill"
    layers: str = setting("75%", "layers to transfer: :18 or 6:12 or -6: or 0,2,4 or 75% or all")
    attention_weight: float = setting(3.0, "weight of the attention loss")


RECIPES = merge_recipes(
    recipes.RECIPES,
    scenes=dict(epochs=300, blr=0.064, weight_decay=1.5),  # 89.5 (scenes-steps)
    digits=dict(epochs=450, blr=0.02048, weight_decay=0.5),  # 87.8 (fair-main)
    cifar=dict(epochs=25, blr=2.048e-2, layers="84%"),  # 68.2 (why-cifar10)
    cifar_gpu=dict(epochs=100, blr=5e-4, weight_decay=0.05),  # not measured
    imagenet=dict(epochs=200, blr=1e-4, weight_decay=0.3),  # 85.7 in the paper, not run here
    folder=dict(blr=3.2e-3),  # photos-tuning
)
parse = partial(parse_settings, __doc__, Settings, RECIPES)


def attention_loss(ours: QK, theirs: QK) -> Tensor:
    """Cross-entropy of the student's maps relative to the teacher's, in nats: a scalar.

    Its minimum is the entropy of the teacher's maps, not 0. Its gradients are those of the KL
    divergence. This is the definition; training takes compare_maps (common/attention.py).
    """
    p_t, log_p_s = theirs.map(), ours.scores().log_softmax(dim=-1)
    return -(p_t * log_p_s).sum(dim=-1).mean()


def loss(student: ViT, images, labels, teacher: Teacher, layers: list[int], settings: Settings):
    """Classification, and in `layers` the student's maps against the teacher's, block by block."""
    factors = student.draw_drop_path(len(images))  # both drop the same branches, as the authors do
    blocks, lent = student.blockwise(images, None, factors), teacher.lend(images, layers, factors)
    losses, divergences = [], []
    for (x, ours), theirs in zip(blocks, lent, strict=True):
        if theirs is not None:
            cross_entropy, entropy = compare_maps(ours, theirs)  # attention_loss, in less memory
            losses.append(cross_entropy)
            divergences.append((cross_entropy - entropy).detach())
    logits = student.classify(x)
    classification = F.cross_entropy(logits, labels, label_smoothing=settings.smoothing)
    total = classification + settings.attention_weight * sum(losses)
    kl = sum(divergences) / len(layers)  # in nats: 0 where the maps agree
    return total, {"class": classification, "kl": kl}


def task(settings: Settings, dataset: data.Data, checkpoint=None) -> train.Task:
    teacher, student, layers = make_pair(settings, dataset, checkpoint)  # the teacher is frozen
    return train.Task(
        student,
        dataset,
        loss=partial(loss, teacher=teacher, layers=layers, settings=settings),
        checkpoint=checkpoint,
    )


def main(settings: Settings) -> dict:
    dataset = data.load(settings)
    checkpoint = find_teacher(settings, dataset)
    return train.fit(task(settings, dataset, checkpoint), settings)


if __name__ == "__main__":
    launch.run(main, parse)
