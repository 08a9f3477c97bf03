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
SCRATCH = change(  # with --teacher none. ImageNet: the recipe of distillation, less the teacher
    COMMON | TEACHER | SOURCE,
    #             digits cifar imagenet
    lr=           (2e-3, 1e-3, 8e-4),
    weight_decay= (1.5,  0.05, 0.3),
)  # fmt: skip
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


def task(settings: Settings, images: data.Data | None = None) -> train.Task:
    """Everything that train.fit needs. `images`: others than those that the settings name."""
    device = launch.device(settings.device)
    if settings.teacher == "random":
        raise ValueError(
            "--teacher random: fine-tuning random weights is training from scratch, --teacher none"
        )
    teachers.check(settings)
    images = images or data.load(settings, device)
    torch.manual_seed(settings.seed)
    net = vit.ViT(families.sizes(settings, images), settings.drop_path)
    teacher = teachers.find(settings, images)
    if teacher:
        images.adopt(teacher)
        torch.manual_seed(settings.seed)
        net = from_teacher(teacher, settings, images)
    name = "finetune" if teacher else "scratch"
    own_loss = partial(loss, settings=settings)
    return train.Task(name, net.to(device), images, own_loss, predict, teacher=teacher)


def from_teacher(teacher: checkpoints.Checkpoint, settings: Settings, images: data.Data) -> vit.ViT:
    """The teacher with a new head; --model and --patch must not say another architecture."""
    net = checkpoints.load(
        teacher,
        image_size=images.image_size,
        classes=len(images.classes),
        drop_path=settings.drop_path,
    )
    teachers.check_components(settings, net.config)
    arch, size = net.architecture, families.size(settings.model)
    named = (*size, settings.patch, images.channels)
    if tuple(arch[k] for k in ("dim", "depth", "heads", "patch", "channels")) != named:
        raise ValueError(
            f"{teacher.source} has width {arch['dim']}, depth {arch['depth']}, {arch['heads']} "
            f"heads, patch {arch['patch']} and {arch['channels']} channels, unlike --model "
            f"{settings.model} --patch {settings.patch} --data {settings.data}: change these"
        )
    nn.init.trunc_normal_(net.head.weight, std=2e-5)  # MAE: do not shake what is already good
    return net


def main(settings: Settings) -> dict:
    runs.check(settings, "scratch" if settings.teacher == "none" else "finetune")
    return train.fit(task(settings), settings)


if __name__ == "__main__":
    launch.run(main, parse)
