"""Activation attention transfer: a small CNN learns where a larger one is active.

Zagoruyko and Komodakis, ICLR 2017 (arXiv 1612.03928). The "attention map" of a
group of layers is how strongly each place is active, whatever the channel:

    at(x) = sum over channels of x^2, flattened, divided by its L2 norm
    loss  = classification + weight * sum over groups of
            mean over images and places of (at(student) - at(teacher))^2

and no query looks at any key: that is all it has in common with a ViT's
attention. Beside it, distillation of the teacher's softened classes (Hinton et
al. 2015). Moonshine (Crowley et al., NeurIPS 2018, arXiv 1711.02613) keeps the
teacher's shape and makes its convolutions cheap: --model grouped, bottleneck.

    python -m related.activations                        trains a teacher first
    python -m related.activations --at-weight 0 --kd-weight 0.9 --out runs/kd
    python -m related.activations --at-weight 0 --out runs/alone        control
    python -m related.activations --model grouped --out runs/grouped

SGD is theirs; here the optimiser is AdamW, as everywhere in this repository. On
several GPUs the norms are over each one's share of a batch.
"""

import launch

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoints
import data
import finetune
import runs
import storage
import teachers
import train
from related.wide_resnet import MODELS, WideResNet
from settings import AUGMENTATION, IMAGES, RUN, TRAINING, Setting, Settings, change, parse_settings

SETTINGS = change(
    IMAGES | TRAINING | AUGMENTATION | RUN,
    #             digits cifar
    num_labels=   (300,  0),
    epochs=       (60,   100),
    warmup=       (6,    5),
    lr=           (4e-3, 2e-3),
    weight_decay= 0.05,
    eval_every=   (20,   5),
) | {
    "model": Setting("small", "the student, or the teacher alone", choices=MODELS),
    "teacher": Setting("auto", "model.pt of a teacher (auto: made here first)", free=True),
    # Theirs is 1000 for 32 x 32 places. In a mean over 12 x 12 each counts 7 times as much.
    "at_weight": Setting((140.0, 1000.0), "weight of attention transfer (0: none)"),
    "kd_weight": Setting(0.0, "share of the loss that the teacher's classes are", high=1),
    "temperature": Setting(4.0, "that softens these classes", low=0.01),
    "kd": Setting(
        "kl", "how they are compared: kl, sum over classes; moonshine: mean over them, doubled",
        choices=("kl", "moonshine"),
    ),
}  # fmt: skip
parse = partial(parse_settings, __doc__, SETTINGS)


def at(x: Tensor) -> Tensor:
    """Where a layer is active: (B, C, H, W) to (B, H * W), each of L2 norm 1 (section 3.1)."""
    return F.normalize(x.float().square().mean(dim=1).flatten(1))


def at_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    return (at(ours) - at(theirs)).square().mean()


def kd_loss(logits: Tensor, theirs: Tensor, settings: Settings) -> Tensor:
    """KL divergence of the softened classes, times T^2; as each paper's code averages it."""
    t = settings.temperature
    log_p, p_t = (logits / t).log_softmax(dim=-1), (theirs / t).softmax(dim=-1)
    if settings.kd == "kl":
        return F.kl_div(log_p, p_t, reduction="batchmean") * t**2
    return F.kl_div(log_p, p_t, reduction="none").mean() * t**2 * 2


def loss(
    student: WideResNet,
    images,
    labels,
    teacher: WideResNet,
    settings: Settings,
    shown: Tensor | None = None,
    groups: Sequence[int] = (0, 1, 2),
):
    """Classes, the teacher's softened ones, and where its groups are active.

    `shown`: what the student sees, if not the images themselves.
    """
    with torch.no_grad():
        theirs = list(teacher.run(images))
        targets = teacher.classify(theirs[-1])
    ours = list(student.run(images if shown is None else shown))
    logits, share = student.classify(ours[-1]), settings.kd_weight
    own = F.cross_entropy(logits, labels, label_smoothing=settings.smoothing)
    terms = {"class": (1 - share) * own}
    if settings.at_weight:
        terms["at"] = settings.at_weight * sum(at_loss(ours[i], theirs[i]) for i in groups)
    if share:
        terms["kd"] = share * kd_loss(logits, targets, settings)
    return terms, {}


def task(settings: Settings, dataset: data.Data | None = None) -> train.Task:
    """Everything that train.fit needs. `dataset`: used instead of what the settings name."""
    device = launch.device(settings.device)
    dataset = dataset or data.load(settings, device)
    alone = settings.model == "teacher" or not (settings.at_weight or settings.kd_weight)
    source = None if alone else find_teacher(settings, dataset)
    torch.manual_seed(settings.seed)
    build: Callable = partial(WideResNet, channels=dataset.channels, classes=len(dataset.classes))
    student = build(settings.model).to(device)
    own_loss = partial(finetune.loss, settings=settings)
    if source:
        teacher = frozen(source, build("teacher")).to(device)
        own_loss = partial(loss, teacher=teacher, settings=settings)
    return train.Task(
        "activations",
        student,
        dataset,
        loss=own_loss,
        predict=finetune.predict,
        export=export,
        teacher=source,
    )


def find_teacher(settings: Settings, dataset: data.Data) -> checkpoints.Checkpoint:
    """The teacher that is named, or made here first. ValueError if it is not of these images."""
    path = settings.teacher
    if path == "auto":
        path = teachers.make(
            "activations", sys.modules[__name__], settings, dataset, model="teacher"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"no teacher at {path}")
    state = storage.read(path)
    try:
        of_model = state["method"], state["settings"]["model"]
        known = state["classes"], state["normalization"]
        weights, channels = dict(state["model"]), len(known[1][0])
    except (LookupError, TypeError, ValueError):
        of_model = ()
    if of_model != ("activations", "teacher"):
        raise ValueError(f"--teacher {path}: not what --model teacher leaves")
    if (known[0], channels) != (dataset.classes, dataset.channels):
        raise ValueError(f"--teacher {path}: is for other images than --data {settings.data}")
    return checkpoints.Checkpoint(str(path), weights, {}, *known, "activations")


def frozen(source: checkpoints.Checkpoint, net: WideResNet) -> WideResNet:
    """The net with these weights, as a teacher."""
    try:
        net.load_state_dict(source.weights)
    except RuntimeError as error:
        raise ValueError(f"--teacher {source.source}: holds the weights of another net") from error
    return net.eval().requires_grad_(False)


def export(net: WideResNet) -> dict:
    return {"model": net.state_dict()}


def main(settings: Settings) -> dict:
    runs.check(settings, "activations")
    return train.fit(task(settings), settings)


if __name__ == "__main__":
    launch.run(main, parse)
