"""The baselines: fine-tuning starts from a teacher's weights, scratch from random ones.

python finetune.py                             scenes (weights/scenes.pt)
python finetune.py --teacher none              from scratch
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import recipes
import train
from common import launch
from common.settings import Recipes, merge_recipes, parse_settings, setting
from teachers.find import find_teacher
from teachers.load import build_vit, new_vit
from vit import ViT


@dataclass(frozen=True)
class Settings(recipes.Settings):
    teacher: str = setting(
        "auto", "auto, pretrain, none, mae, NAME (python -m teachers), file or URL", free=True
    )
    normalization: str = setting("", recipes.NORMALIZATION, ("", *recipes.NORMALIZATIONS))

    @property
    def method(self) -> str:
        return "scratch" if self.teacher == "none" else "finetune"


RECIPES = merge_recipes(
    recipes.RECIPES,
    scenes=dict(epochs=300, blr=1e-3, weight_decay=0.05, layer_decay=0.75),  # 93.8 (scenes-steps)
    digits=dict(epochs=450, blr=0.04096, weight_decay=0.5, layer_decay=0.75),  # 88.5 (fair-main)
    cifar=dict(epochs=25, blr=1.024e-2, layer_decay=0.75),  # 69.4 (why-cifar10)
    cifar_gpu=dict(epochs=100, blr=5e-4, weight_decay=0.05, layer_decay=0.75),  # not measured
    imagenet=dict(  # MAE's FINETUNE.md, ViT-L: 85.9 there, not run here
        epochs=50, batch=1024, blr=1e-3, final_lr=2.5e-4, weight_decay=0.05, beta2=0.999,
        layer_decay=0.75, ema=0.0,
    ),
    folder=dict(blr=3.2e-3, layer_decay=0.75),  # photos-tuning
)  # fmt: skip


def choose_recipes(given: dict) -> Recipes:
    """Training from scratch has its own recipes."""
    return recipes.RECIPES if given.get("teacher") == "none" else RECIPES


parse = partial(parse_settings, __doc__, Settings, choose_recipes)


def loss(net: ViT, images: Tensor, labels: Tensor, smoothing: float):
    return F.cross_entropy(net(images), labels, label_smoothing=smoothing), {}


def task(settings: Settings, dataset: data.Data, checkpoint=None) -> train.Task:
    torch.manual_seed(settings.seed)
    if checkpoint:
        net = build_vit(checkpoint, dataset.image_size, len(dataset.classes), settings.drop_path)
        head = net.get_parameter("head.weight")
        nn.init.trunc_normal_(head, std=2e-5)  # as in MAE, so the blocks' first gradients are tiny
    else:
        net = new_vit(settings, dataset)
    return train.Task(
        net.to(dataset.train.device),
        dataset,
        loss=partial(loss, smoothing=settings.smoothing),
        checkpoint=checkpoint,
    )


def main(settings: Settings) -> dict:
    dataset = data.load(settings)
    checkpoint = find_teacher(settings, dataset)
    return train.fit(task(settings, dataset, checkpoint), settings)


if __name__ == "__main__":
    launch.run(main, parse)
