"""DINO in small: a teacher without labels, whose class token means something.

Caron et al., ICCV 2021 (arXiv 2104.14294). A student and a teacher see two
views of an image. Each names a distribution over invented classes, and the
student's is pulled to the teacher's. The teacher is a slow average of the
student. Its outputs are sharpened, and their mean is subtracted, so that they
do not collapse to one class. Our batches are small, so the head has batch norms
as well. On the digits, two views are two placements among distractors.

    python -m related.dino                         digits
    python -m related.dino --data cifar10

The test classifies each class token by its 20 nearest neighbours (section 3.2).
Labels are used for nothing else.
"""

import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import data
import recipes
import train
from common import checkpoints, launch
from common.settings import merge_recipes, parse_settings, setting
from datasets import sources
from teachers.load import new_vit
from vit import ViT


@dataclass(frozen=True)
class Settings(recipes.Settings):
    data: str = setting("digits", "data set", tuple(recipes.DATA_SETS))
    method = "dino"
    layer_decay: float = 1.0  # no flag: the layers are inside
    prototypes: int = setting(256, "invented classes", low=2)
    momentum: float = setting(0.99, "of the teacher as an average of the student", high=1)
    center_momentum: float = setting(0.9, "of the mean output that is subtracted", high=1)
    student_temperature: float = setting(0.1, "of the student's distribution", low=0.01)
    teacher_temperature: float = setting(0.04, "of the teacher's: lower is sharper", low=0.01)


SHARED = dict(num_labels=0, weight_decay=0.05, beta2=0.95, ema=0.0, final_lr=0.0, drop_path=0.0)
PHOTOS = SHARED | dict(random_erase=0.0, randaugment=0, mixup=0.0, cutmix=0.0, clip=0.0)
RECIPES = merge_recipes(  # but for the epochs those of pretrain.py
    recipes.RECIPES,
    digits=SHARED | dict(epochs=100, batch=128, blr=4e-3),
    cifar=PHOTOS | dict(epochs=200, warmup=0.05, batch=1024, blr=2.5e-4),
    imagenet=PHOTOS | dict(epochs=800, warmup=0.05, batch=4096, blr=1.5e-4, crop_area=0.2),
    folder=PHOTOS | dict(epochs=150, warmup=0.0667, blr=4e-3, crop_area=0.2),
)
parse = partial(parse_settings, __doc__, Settings, RECIPES)


class Net(nn.Module):
    """A ViT, and a head that names invented classes from its class token."""

    def __init__(self, vit: ViT, prototypes: int):
        super().__init__()
        self.vit, dim = vit, vit.config.dim
        self.mlp = nn.Sequential(
            nn.Linear(dim, 128), nn.BatchNorm1d(128, affine=False), nn.GELU(),
            nn.Linear(128, 64), nn.BatchNorm1d(64, affine=False),
        )  # fmt: skip
        self.prototypes = nn.Parameter(torch.randn(prototypes, 64))

    def forward(self, images: Tensor) -> Tensor:
        y = F.normalize(self.mlp(get_class_token(self.vit, images)))
        return y @ F.normalize(self.prototypes).T


def get_class_token(vit: ViT, images: Tensor) -> Tensor:
    """As the last block leaves it, normalised: (B, D)."""
    return vit.fc_norm(vit.forward_features(images))[:, 0]


class Dino(nn.Module):
    """The student, and the teacher that follows it."""

    def __init__(self, vit: ViT, settings: Settings):
        super().__init__()
        self.student, self.settings = Net(vit, settings.prototypes), settings
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(settings.prototypes))
        self.config = vit.config

    @torch.no_grad()
    def follow(self) -> None:
        """Updates the teacher after a step of the student."""
        pairs = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(*pairs, 1 - self.settings.momentum)

    @torch.no_grad()
    def make_targets(self, views: Tensor) -> Tensor:
        """The teacher's distributions (B, prototypes), sharpened and centred."""
        y = self.teacher(views)
        p = ((y - self.center) / self.settings.teacher_temperature).softmax(dim=-1)
        mean = y.mean(dim=0)
        if dist.is_initialized():
            dist.all_reduce(mean.div_(launch.world()))
        self.center.lerp_(mean.to(self.center.dtype), 1 - self.settings.center_momentum)
        return p


def loss(net: Dino, images: Tensor, labels, batch: int):
    """Each view's distribution is pulled to the teacher's of the other view (equation 3)."""
    if len(images) != batch:
        raise launch.Failed("DINO's norms are over the batch, which must fit in memory at once")
    net.follow()
    views = torch.cat(images.chunk(2, dim=1))
    p = net.make_targets(views).roll(len(images), dims=0)  # of the other view
    log_p = (net.student(views) / net.settings.student_temperature).log_softmax(dim=-1)
    entropy = torch.special.entr(p).sum(dim=-1).mean()
    total = -(p * log_p).sum(dim=-1).mean()
    return total, {"views": total, "teacher_entropy": entropy}


def show_two_views(dataset: data.Data) -> data.Data:
    """The same data set. A training image becomes two views of it, one behind the other."""
    view = copy.copy(dataset.train)
    once = view.augment
    view.augment = lambda x, draws: torch.cat([once(x, draws), once(x, draws)], dim=1)
    return dataset._replace(train=view, mean=2 * dataset.mean, std=2 * dataset.std)


def task(settings: Settings, dataset: data.Data) -> train.Task:
    if not isinstance(dataset.train.source, sources.Tensors):
        raise ValueError("DINO needs two views, but images that are streamed are cropped once")
    torch.manual_seed(settings.seed)
    net = Dino(new_vit(settings, dataset, classes=0), settings).to(dataset.train.device)
    own_loss = partial(loss, batch=dataset.train.batch // launch.world())
    return train.Task(net, show_two_views(dataset), own_loss, predict=None, export=export)


def export(net: nn.Module) -> dict:
    """The ViT without a head: others would let it read the patches, not the class token."""
    found = checkpoints.export(get_vit(net))
    weights = {k: v for k, v in found["model"].items() if not k.startswith("head.")}
    return found | {"model": weights, "architecture": found["architecture"] | {"classes": 0}}


def get_vit(net: nn.Module) -> ViT:
    """Of DINO that of the teacher, which is the better of the two."""
    return net.teacher.vit if isinstance(net, Dino) else getattr(net, "vit", net)


def classify_by_neighbours(net: nn.Module, dataset: data.Data) -> dict[str, Tensor]:
    """Classes of the test images by the 20 nearest neighbours of class tokens, and the true ones.

    They are among 4,000 training images. Each votes with exp(cosine similarity / 0.07), as DINO's.
    """
    vit, (bank, labels) = get_vit(net), dataset.train.first(4000)
    known = torch.cat([F.normalize(get_class_token(vit, some)) for some in bank.split(256)])
    found, images = [], copy.copy(dataset.test)
    images.rank, images.world = 0, 1  # all of them, also as one of many processes
    for x, truth in images.in_order(256):
        near, which = (F.normalize(get_class_token(vit, x)) @ known.T).topk(min(20, len(known)))
        votes = torch.zeros(len(x), len(dataset.classes), device=x.device)
        votes.scatter_add_(1, labels[which], (near / 0.07).exp())
        found.append(torch.stack([votes.argmax(dim=1), truth]))
    return dict(zip(("predicted", "labels"), torch.cat(found, dim=1), strict=True))


def main(settings: Settings, task=task) -> dict:
    dataset = data.load(settings)
    test = partial(classify_by_neighbours, dataset=dataset)
    return train.fit(task(settings, dataset), settings, test)


if __name__ == "__main__":
    launch.run(main, parse)
