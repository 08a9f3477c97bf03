"""DINO in small: a teacher without labels, whose class token means something.

Caron et al., ICCV 2021 (arXiv 2104.14294): a student and a teacher see two
views of an image; the student's distribution over invented classes is pulled to
the teacher's. The teacher is a slow average of the student, sharpened by a low
temperature, and kept from collapse by the mean of its outputs being taken away;
in batches as small as ours that is not enough, so the head has norms over the
batch as well. For related/attndistill.py, which needs such a teacher. Of DINO's
crops only the two global ones: on the digits, two placements among other scraps.

    python -m related.dino                         digits
    python -m related.dino --data cifar10

It is tested by the weighted 20 nearest neighbours of the class tokens (section
3.2), labels being used for nothing else.
"""

import launch
from launch import Failed, world

import copy
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoints
import data
import families
import image_files
import pretrain
import runs
import train
from settings import Setting, Settings, change, parse_settings
from vit import Config, ViT

OWN = {
    "prototypes": Setting(256, "invented classes", low=2),
    "momentum": Setting(0.99, "of the teacher as an average of the student", high=1),
    "center_momentum": Setting(0.9, "of the mean output that is taken away", high=1),
    "student_temperature": Setting(0.1, "of the student's distribution", low=0.01),
    "teacher_temperature": Setting(0.04, "of the teacher's: lower, so sharper", low=0.01),
}
MAES = {"mask_ratio", "norm_pix_loss", "reconstruct"}
SETTINGS = change(  # as of pre-training, less what is MAE's
    {k: v for k, v in pretrain.SETTINGS.items() if k not in MAES and "decoder" not in k},
    #             digits cifar
    epochs=       (100,  200),
    warmup=       (10,   10),
    lr=           (2e-3, 1e-3),
) | OWN  # fmt: skip
parse = partial(parse_settings, __doc__, SETTINGS)


class Net(nn.Module):
    """A ViT, and a head that names invented classes of its class token."""

    def __init__(self, vit: ViT, prototypes: int):
        super().__init__()
        self.vit, dim = vit, vit.config.dim
        self.mlp = nn.Sequential(
            nn.Linear(dim, 128), nn.BatchNorm1d(128, affine=False), nn.GELU(),
            nn.Linear(128, 64), nn.BatchNorm1d(64, affine=False),
        )  # fmt: skip
        self.prototypes = nn.Parameter(torch.randn(prototypes, 64))

    def forward(self, images: Tensor) -> Tensor:
        y = F.normalize(self.mlp(class_token(self.vit, images)))
        return y @ F.normalize(self.prototypes).T


def class_token(vit: ViT, images: Tensor) -> Tensor:
    """As the last block leaves it, normalised: (B, D)."""
    return vit.fc_norm(vit.encode(vit.embed(images)))[:, 0]


class Dino(nn.Module):
    """The student, and the teacher that follows it."""

    def __init__(self, vit: ViT, settings: Settings):
        super().__init__()
        self.student, self.settings = Net(vit, settings.prototypes), settings
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(settings.prototypes))

    @property
    def config(self) -> Config:
        return self.student.vit.config

    @torch.no_grad()
    def follow(self) -> None:
        """The teacher, after a step of the student."""
        pairs = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(*pairs, 1 - self.settings.momentum)

    @torch.no_grad()
    def targets(self, views: Tensor) -> Tensor:
        """What the teacher makes of views: (B, prototypes), sharpened and centred."""
        y = self.teacher(views)
        p = ((y - self.center) / self.settings.teacher_temperature).softmax(dim=-1)
        mean = y.mean(dim=0)
        if dist.is_initialized():
            dist.all_reduce(mean.div_(world()))
        self.center.lerp_(mean.to(self.center.dtype), 1 - self.settings.center_momentum)
        return p


def loss(net: Dino, images: Tensor, labels, batch: int):
    """Each view's distribution is pulled to the teacher's of the other view (equation 3)."""
    if len(images) != batch:
        raise Failed("DINO's norms and centre are over the batch, which must fit in memory at once")
    net.follow()
    views = torch.cat(images.chunk(2, dim=1))
    p = net.targets(views).roll(len(images), dims=0)  # of the other view
    log_p = (net.student(views) / net.settings.student_temperature).log_softmax(dim=-1)
    entropy = torch.special.entr(p).sum(dim=-1).mean()
    return {"views": -(p * log_p).sum(dim=-1).mean()}, {"teacher_entropy": entropy}


def two_views(dataset: data.Data) -> data.Data:
    """The same data set; a training image is two views of it, one behind the other in channels."""
    view = copy.copy(dataset.train)
    once = view.augment
    view.augment = lambda x, draws: torch.cat([once(x, draws), once(x, draws)], dim=1)
    return replace(dataset, train=view, channels=2 * dataset.channels)


def task(settings: Settings, dataset: data.Data | None = None) -> train.Task:
    """Everything that train.fit needs. `dataset`: used instead of what the settings name."""
    device = launch.device(settings.device)
    dataset = dataset or data.load(settings, device)
    if isinstance(dataset.train.source, image_files.Files):
        raise ValueError(
            f"--data {settings.data}: files are cropped once, and this needs two views"
        )
    torch.manual_seed(settings.seed)
    net = Dino(encoder(settings, dataset), settings).to(device)
    return train.Task(
        "dino",
        net,
        two_views(dataset),
        loss=partial(loss, batch=dataset.train.batch // world()),
        test=partial(tested, dataset=dataset),
        export=export,
    )


def encoder(settings: Settings, dataset: data.Data, **changes) -> ViT:
    """A random ViT without a head; ValueError if it has no class token."""
    config = replace(families.sizes(settings, dataset), classes=0, **changes)
    if not config.class_token:
        raise ValueError("--components class_token=0: it is the class token that learns here")
    return ViT(config)


def export(net: Dino) -> dict:
    """The teacher's ViT, which is the better of the two."""
    return checkpoints.export(net.teacher.vit)


def tested(net: Dino, dataset: data.Data) -> dict[str, Tensor]:
    return nearest(net.teacher.vit, dataset)


def nearest(vit: ViT, dataset: data.Data) -> dict[str, Tensor]:
    """Classes of the test images by the 20 nearest neighbours of class tokens, and the true ones.

    The neighbours are 4,000 training images as the first epochs show them; each votes with
    exp(cosine similarity / 0.07), as in DINO's evaluation.
    """
    bank, labels = dataset.train.first(4000)
    known = torch.cat([F.normalize(class_token(vit, some)) for some in bank.split(256)])
    found, test = [], copy.copy(dataset.test)
    test.rank, test.world = 0, 1  # all of them, also as one of many processes
    for x, truth in test.in_order(256):
        near, which = (F.normalize(class_token(vit, x)) @ known.T).topk(min(20, len(known)))
        votes = torch.zeros(len(x), len(dataset.classes), device=x.device)
        votes.scatter_add_(1, labels[which], (near / 0.07).exp())
        found.append(torch.stack([votes.argmax(dim=1), truth]))
    return dict(zip(("predicted", "labels"), torch.cat(found, dim=1), strict=True))


def main(settings: Settings) -> dict:
    runs.check(settings, "dino")
    return train.fit(task(settings), settings)


if __name__ == "__main__":
    launch.run(main, parse)
