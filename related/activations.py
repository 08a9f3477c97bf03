"""Activation attention transfer: a small CNN learns where a larger one is active.

Zagoruyko and Komodakis, ICLR 2017 (arXiv 1612.03928). The "attention map" of a
group of layers says how strongly each place is active, whatever the channel:

    at(x) = sum over channels of x^2, flattened, divided by its L2 norm
    loss  = classification + weight * sum over groups of
            mean over images and places of (at(student) - at(teacher))^2

No query looks at any key here, unlike in a ViT. --kd-weight adds distillation
of the teacher's softened classes (Hinton et al. 2015). Moonshine (Crowley et
al., NeurIPS 2018, arXiv 1711.02613) keeps the teacher's shape and makes its
convolutions cheap: --model bottleneck. Here AdamW replaces SGD, and batch norms
see only their own GPU's share of a batch.

    python -m related.activations                        trains a teacher first
    python -m related.activations --at-weight 0 --out runs/alone        control
"""

import sys
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import recipes
import train
from common import checkpoints, launch
from common.settings import merge_recipes, parse_settings, setting
from related.wide_resnet import MODELS, WideResNet
from teachers.find import make_teacher


@dataclass(frozen=True)
class Settings(recipes.Settings):
    data: str = setting("digits", "data set", tuple(recipes.DATA_SETS))
    method = "activations"
    model: str = setting("thin", "the student, or the teacher alone: " + ", ".join(MODELS), MODELS)
    patch: int = setting(0)
    unused = "patch", "positions", "drop_path", "layer_decay"  # a CNN has none
    teacher: str = setting("auto", "model.pt of a teacher, or auto: trained first", free=True)
    at_weight: float = setting(35.0, "weight of attention transfer (0: none)")
    kd_weight: float = setting(0.0, "share of the loss for the teacher's classes", high=1)
    temperature: float = setting(4.0, "softens these classes", low=0.01)

    @property
    def has_teacher(self) -> bool:
        return self.model != "teacher" and bool(self.at_weight or self.kd_weight)


PHOTOS = dict(weight_decay=0.05, model="small", at_weight=1000.0)  # theirs, for 32 x 32 places
RECIPES = merge_recipes(
    recipes.RECIPES,
    digits=dict(num_labels=300, distractors=4, epochs=40, blr=0.04096, eval_every=20,
                weight_decay=0.05),  # with one distractor small nets have nothing to gain
    cifar=PHOTOS | dict(blr=1e-3, final_lr=5e-4, eval_every=5),
    imagenet=PHOTOS,
    folder=PHOTOS | dict(blr=8e-3, final_lr=5e-4),
)  # fmt: skip
parse = partial(parse_settings, __doc__, Settings, RECIPES)


def at(x: Tensor) -> Tensor:
    """Where a layer is active: (B, C, H, W) to (B, H * W), each of L2 norm 1 (section 3.1)."""
    return F.normalize(x.float().square().mean(dim=1).flatten(1))


def at_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    return (at(ours) - at(theirs)).square().mean()


def kd_loss(logits: Tensor, theirs: Tensor, settings: Settings) -> Tensor:
    """KL divergence of the softened classes, times T^2. Moonshine: twice the mean of that."""
    t = settings.temperature
    log_p, p_t = (logits / t).log_softmax(dim=-1), (theirs / t).softmax(dim=-1)
    return F.kl_div(log_p, p_t, reduction="batchmean") * t**2


def loss(student, images, labels, teacher, settings: Settings, seen=None, groups=(0, 1, 2)):
    """Of the labels, of the teacher's softened classes, and of where `groups` are active.

    `seen`: what the student sees, if not the images themselves.
    """
    ours = list(student.groupwise(images if seen is None else seen))
    logits = student.classify(ours[-1])
    classification = F.cross_entropy(logits, labels, label_smoothing=settings.smoothing)
    if teacher is None:
        return classification, {}
    with torch.no_grad():
        theirs = list(teacher.groupwise(images))
        targets = teacher.classify(theirs[-1])
    terms = {"class": (1 - settings.kd_weight) * classification}
    if settings.at_weight:
        terms["at"] = settings.at_weight * sum(at_loss(ours[i], theirs[i]) for i in groups)
    if settings.kd_weight:
        terms["kd"] = settings.kd_weight * kd_loss(logits, targets, settings)
    return sum(terms.values()), terms


def task(settings: Settings, dataset: data.Data) -> train.Task:
    teacher, checkpoint = None, find_teacher(settings, dataset)
    if checkpoint:
        teacher = WideResNet("teacher", dataset).to(dataset.train.device).eval()
        teacher.requires_grad_(False).load_state_dict(checkpoint.weights)
    torch.manual_seed(settings.seed)
    student = WideResNet(settings.model, dataset).to(dataset.train.device)
    own_loss = partial(loss, teacher=teacher, settings=settings)
    return train.Task(student, dataset, own_loss, export=export, checkpoint=checkpoint)


def find_teacher(settings: Settings, dataset: data.Data) -> checkpoints.Checkpoint | None:
    """The named teacher, or one trained here first. ValueError if it is for other images."""
    if not settings.has_teacher:
        if "teacher" in settings.given:
            raise ValueError("--teacher teaches nothing: --model teacher, or both weights are 0")
        return None
    path = settings.teacher
    if path == "auto":
        path = make_teacher(sys.modules[__name__], settings, dataset, model="teacher")
    found = checkpoints.read_file(path)
    if found.get("method") != "activations" or found["settings"]["model"] != "teacher":
        raise ValueError(f"--teacher {path} is no teacher: --model teacher trains one")
    classes, weights, learned = found["classes"], found["model"], found["learned_from"]
    if (classes, len(weights["mean"])) != (dataset.classes, len(dataset.mean)):
        raise ValueError(f"--teacher {path} is for other images than --data {settings.data}")
    how = dict(settings=found["settings"], learned_from=learned)
    return checkpoints.Checkpoint(str(path), weights, {}, classes, "activations", **how)


def export(net: WideResNet) -> dict:
    return {"model": net.state_dict()}


def main(settings: Settings, task=task) -> dict:
    return train.fit(task(settings, data.load(settings)), settings)


if __name__ == "__main__":
    launch.run(main, parse)
