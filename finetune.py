"""The baselines: fine-tuning starts from a teacher's weights, scratch from none.

    python finetune.py                             digits (weights/digits.pt)
    python finetune.py --teacher none              from scratch; settings of its
                                                   own: --help --teacher none
    torchrun --nproc_per_node=8 finetune.py --data imagenet \\
        --data-dir /imagenet
"""

import launch

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoints
import data
import families
import runs
import teachers
import train
import vit
from settings import COMMON, TEACHER, TEACHERS, Setting, Settings, change, parse_settings

SOURCE = {"teacher": Setting("auto", TEACHERS + "none, or a checkpoint's path or URL", free=True)}
SCRATCH = COMMON | TEACHER | SOURCE  # with --teacher none: the recipe of training from scratch
SETTINGS = change(  # ImageNet: MAE's FINETUNE.md, ViT-L
    COMMON | TEACHER | SOURCE,
    #             digits cifar imagenet
    epochs=       (450,  100,  50),
    warmup=       (45,   5,    5),
    batch=        (50,   512,  1024),
    lr=           (8e-3, 1e-3, 4e-3),
    weight_decay= (0.5,  0.05, 0.05),
    beta2=        0.999,
    layer_decay=  0.75,
    ema=          (0.0,  0.999, 0.0),
)  # fmt: skip
parse = partial(parse_settings, __doc__, SETTINGS, variants={("teacher", "none"): SCRATCH})


def predict(net: vit.ViT, images: Tensor) -> Tensor:
    return net(images)


def loss(net: vit.ViT, images, labels, settings: Settings):
    return {"class": F.cross_entropy(net(images), labels, label_smoothing=settings.smoothing)}, {}


def task(settings: Settings, dataset: data.Data | None = None) -> train.Task:
    """Everything that train.fit needs. `dataset`: used instead of what the settings name."""
    device = launch.device(settings.device)
    if settings.teacher == "random":
        raise ValueError(
            "--teacher random: fine-tuning random weights is training from scratch, --teacher none"
        )
    teachers.check(settings)
    dataset = dataset or data.load(settings, device)
    sizes = families.sizes(settings, dataset)
    sizes.check()  # before a teacher is made or fetched
    teacher = teachers.find(settings, dataset)
    torch.manual_seed(settings.seed)
    if teacher:
        dataset.adopt(teacher)
        net = from_teacher(teacher, settings, dataset)
    else:
        net = vit.ViT(sizes, settings.drop_path)
    return train.Task(
        "finetune" if teacher else "scratch",
        net.to(device),
        dataset,
        loss=partial(loss, settings=settings),
        predict=predict,
        teacher=teacher,
    )


def from_teacher(
    teacher: checkpoints.Checkpoint, settings: Settings, dataset: data.Data
) -> vit.ViT:
    """The teacher with a new head; --model and --patch must not say another architecture."""
    net = checkpoints.load(
        teacher,
        image_size=dataset.image_size,
        classes=len(dataset.classes),
        drop_path=settings.drop_path,
    )
    teachers.check_components(settings, net.config)
    config, asked = net.config, (*families.size(settings.model), settings.patch, dataset.channels)
    if (config.dim, config.depth, config.heads, config.patch, config.channels) != asked:
        raise ValueError(
            f"{teacher.source} has width {config.dim}, depth {config.depth}, {config.heads} "
            f"heads, patch {config.patch} and {config.channels} channels, unlike --model "
            f"{settings.model} --patch {settings.patch} --data {settings.data}: change these"
        )
    nn.init.trunc_normal_(net.head.weight, std=2e-5)  # as MAE: small, to spare the rest at first
    return net


def main(settings: Settings) -> dict:
    runs.check(settings, "scratch" if settings.teacher == "none" else "finetune")
    return train.fit(task(settings), settings)


if __name__ == "__main__":
    launch.run(main, parse)
