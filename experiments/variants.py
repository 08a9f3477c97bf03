"""Attention transfer with one thing changed, and the baselines beside it.

    python -m experiments.variants --maps mean               copy; one map for all
    python -m experiments.variants --start teacher           copy, and weights too
    python -m experiments.variants --how distill --detach    only q and k follow
    python -m experiments.variants --how features            another target
    python -m experiments.variants --how probe --teacher A/model.pt

Rows of the study (experiments/rows.py). Without a change, copy and distill are
attention_copy.py and attention_distill.py.
"""

import launch

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

import attention_distill
import checkpoints
import data
import finetune
import runs
import train
from attention import Attended, attention_map, lend_map
from attention_loss import attention_loss
from settings import Setting, Settings, change, parse_settings
from teachers import teacher_and_student
from vit import ViT

MAPS = ("teacher", "other", "mean", "uniform", "impulse")
INHERITED = {k: v for k, v in attention_distill.SETTINGS.items() if k != "until"}
SETTINGS = change(INHERITED, layers="all") | {
    "how": Setting(
        "copy",
        "what the student does with its teacher: copy or distill its maps; distill its features "
        "or logits; or be the teacher, with a new head",
        choices=("copy", "distill", "features", "logits", "probe"),
    ),
    "maps": Setting(
        "teacher",
        "the maps to copy or distill: the teacher's, of the image or of another one; the mean of "
        "these; all alike; a random neighbour for each head",
        choices=MAPS,
    ),
    "lend": Setting("qk", "what of q, k, v is copied", choices=("q", "k", "v", "qk", "qkv")),
    "start": Setting("random", "the student's weights at first", choices=("random", "teacher")),
    "detach": Setting(False, "distilling moves queries and keys, not the tokens they are made of"),
    "class_weight": Setting(1.0, "weight of the classification loss"),
    "attention_weight": Setting(3.0, "weight of the loss of distill, features and logits"),
    "temperature": Setting(1.0, "of the softmax of the logits", low=0.01),
    "bank": Setting(512, "training images whose maps are taken for another's, or the mean", low=2),
}  # fmt: skip
USES = {"copy": ("maps", "lend"), "distill": ("maps", "detach")}  # of what one can change
parse = partial(parse_settings, __doc__, SETTINGS)


# Whose maps -----------------------------------------------------------------------------------


class Loans:
    """What is lent for images: for each block q and k, a bias, or None where nothing is."""

    def __init__(self, teacher: ViT, layers: Sequence[int], dataset: data.Data, settings: Settings):
        self.teacher, self.layers, self.parts = teacher, layers, settings.lend
        self.share_drops = settings.share_drops
        self.maps, self.bank, self.fixed = settings.maps, None, []
        if self.maps in ("other", "mean"):
            self.bank, _ = dataset.train.first(settings.bank)
        if self.maps == "mean":
            self.fixed = mean_maps(teacher, self.bank)
        elif self.maps == "uniform":
            self.fixed = [uniform_map(teacher) for _ in teacher.blocks]
        elif self.maps == "impulse":
            torch.manual_seed(settings.seed)
            self.fixed = [impulse_map(teacher) for _ in teacher.blocks]

    @torch.no_grad()
    def __call__(
        self, images: Tensor, mask: Tensor | None, training: bool
    ) -> list[Attended | None]:
        """`mask`: of drop path, the student's."""
        if self.maps == "other":
            images = self.others(len(images), training)
        if self.fixed:
            loans = [lend_map(p.expand(len(images), -1, -1, -1)) for p in self.fixed]
        else:
            mask = mask if self.share_drops else None
            attended = [used._asdict() for _, used in self.teacher.run(images, (), mask)]
            loans = [Attended(**{part: used[part] for part in self.parts}) for used in attended]
        end = max(self.layers) + 1
        return [loan if i in self.layers else None for i, loan in enumerate(loans[:end])]

    def others(self, count: int, training: bool) -> Tensor:
        """Images of the bank: any while training, in evaluation always the same."""
        if training:
            return self.bank[torch.randint(len(self.bank), (count,), device=self.bank.device)]
        return self.bank[torch.arange(count, device=self.bank.device) % len(self.bank)]


@torch.no_grad()
def mean_maps(teacher: ViT, images: Tensor) -> list[Tensor]:
    """Of each block the mean of its maps of images: (1, H, N, N)."""
    sums = [0.0] * len(teacher.blocks)
    for some in images.split(64):
        for i, (_, used) in enumerate(teacher.run(some)):
            sums[i] = sums[i] + attention_map(used).sum(dim=0, keepdim=True)
    return [total / len(images) for total in sums]


def uniform_map(teacher: ViT) -> Tensor:
    """Every query looks at all tokens alike: (1, H, N, N)."""
    device = next(teacher.parameters()).device
    heads, tokens = teacher.config.heads, teacher.config.tokens
    return torch.full((1, heads, tokens, tokens), 1 / tokens, device=device)


def impulse_map(teacher: ViT) -> Tensor:
    """Each head looks at one neighbour of each patch, the same way for all: (1, H, N, N).

    The maps that a structured initialisation begins with (arXiv 2505.19985), here without noise.
    """
    p, side, first = 0.1 * uniform_map(teacher), teacher.config.side, teacher.config.prefix
    p[:, :, :first] *= 10  # what is no patch has no neighbours
    line, patches = torch.arange(side), torch.arange(first, teacher.config.tokens)
    for head in range(teacher.config.heads):
        down, right = torch.randint(-1, 2, (2,)).tolist()
        rows, columns = ((line + step).clamp(0, side - 1) for step in (down, right))
        p[:, head, patches, first + (rows[:, None] * side + columns).flatten()] += 0.9
    return p


# What is done with them -------------------------------------------------------------------------


def predict_copy(student: ViT, images: Tensor, loans: Loans) -> Tensor:
    mask = student.draw_drop_path_mask(len(images), images.device)
    given = loans(images, mask, student.training)
    return student(images, given=given, drop_path_mask=mask)


def loss_copy(student: ViT, images, labels, loans: Loans, settings: Settings):
    return of_class(predict_copy(student, images, loans), labels, settings), {}


def loss_distill(student: ViT, images, labels, loans: Loans, settings: Settings):
    mask = student.draw_drop_path_mask(len(images), images.device)
    x, attention = student.embed(images), 0.0
    blocks = zip(student.blocks, student.through(x, drop_path_mask=mask), strict=True)
    for (block, (made, ours)), target in zip_longest(blocks, loans(images, mask, training=True)):
        if target is not None:
            if settings.detach:
                ours = Attended(*block.attn.project(block.norm1(x.detach()), 0, 2))
            attention = attention + attention_loss(ours, target)[0]
        x = made
    terms = of_class(student.classify(x), labels, settings)
    return terms | {"attention": settings.attention_weight * attention}, {}


def loss_features(student: ViT, images, labels, teacher: ViT, layers, settings: Settings):
    """The tokens after each of `layers`, normalised, are pulled to the teacher's."""
    with torch.no_grad():
        theirs = [normalised(x) for x, _ in teacher.run(images)]
    features = 0.0
    for i, (x, _) in enumerate(student.run(images)):
        if i in layers:
            features = features + F.mse_loss(normalised(x), theirs[i])
    terms = of_class(student.classify(x), labels, settings)
    return terms | {"features": settings.attention_weight * features}, {}


def normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def loss_logits(student: ViT, images, labels, teacher: checkpoints.Model, settings: Settings):
    """Hinton et al. 2015, equation 4: the classes, softened, of a teacher that has learned them."""
    logits, t = student(images), settings.temperature
    with torch.no_grad():
        theirs = (teacher(images) / t).softmax(dim=-1)
    soft = F.cross_entropy(logits / t, theirs) * t**2
    return of_class(logits, labels, settings) | {"logits": settings.attention_weight * soft}, {}


def loss_probe(net: ViT, images, labels, settings: Settings):
    with torch.no_grad():
        x = net.encode(net.embed(images))
    return of_class(net.classify(x), labels, settings), {}


def of_class(logits: Tensor, labels: Tensor, settings: Settings) -> dict[str, Tensor]:
    loss = F.cross_entropy(logits, labels, label_smoothing=settings.smoothing)
    return {"class": settings.class_weight * loss}


# Tasks --------------------------------------------------------------------------------------------


def task(settings: Settings, dataset: data.Data | None = None) -> train.Task:
    """Everything that train.fit needs. `dataset`: used instead of what the settings name."""
    for name in ("maps", "lend", "detach"):
        if name not in USES.get(settings.how, ()) and getattr(settings, name) != SETTINGS[name].of(
            0
        ):
            raise ValueError(
                f"--{name} changes nothing of --how {settings.how}: leave one of them out"
            )
    if settings.lend != "qk" and settings.maps in ("mean", "uniform", "impulse"):
        raise ValueError(
            f"--lend {settings.lend}: --maps {settings.maps} are made of no q, k and v"
        )
    if settings.how == "probe":
        return probe(settings, dataset)
    teacher, student, layers, dataset, source = teacher_and_student(settings, dataset)
    if not isinstance(teacher, ViT) or teacher.config.positions != "absolute":
        raise ValueError(
            "variants are of teachers with absolute positions, whose maps a student takes as they "
            "stand"
        )
    if settings.start == "teacher":
        if not source:
            raise ValueError("--start teacher: name a --teacher with weights of its own")
        torch.manual_seed(settings.seed)
        student = finetune.from_teacher(source, settings, dataset).to(
            launch.device(settings.device)
        )
    export, predict = checkpoints.export, finetune.predict
    if settings.how == "logits":
        if not source or source.architecture["classes"] != len(dataset.classes):
            raise ValueError("--how logits: name a --teacher that was fine-tuned on these classes")
        device = launch.device(settings.device)
        loss = partial(loss_logits, teacher=checkpoints.open_model(source.source, device))
    elif settings.how == "features":
        loss = partial(loss_features, teacher=teacher, layers=layers)
    else:
        loans = Loans(teacher, layers, dataset, settings)
        loss = partial(loss_distill, loans=loans)
        if settings.how == "copy":
            predict, loss = partial(predict_copy, loans=loans), partial(loss_copy, loans=loans)
            export = partial(export_copy, loans=loans)
    loss = partial(loss, settings=settings)
    return train.Task(settings.how, student, dataset, loss, predict, export, teacher=source)


def probe(settings: Settings, dataset: data.Data | None) -> train.Task:
    """The teacher as it is: only a head, and the norm before it, are trained."""
    made = finetune.task(settings, dataset)
    made.net.requires_grad_(False)
    for part in (made.net.fc_norm, made.net.head):
        part.requires_grad_(True)
    made.name, made.loss = "probe", partial(loss_probe, settings=settings)
    return made


def export_copy(student: ViT, loans: Loans) -> dict:
    """As of attention copy; where other things were lent, weights that no one takes for a ViT."""
    if loans.maps == "teacher" and loans.parts == "qk":
        return checkpoints.export(student, loans.teacher, loans.layers)
    return {"student": student.state_dict()}


def main(settings: Settings) -> dict:
    runs.check(settings, settings.how)
    return train.fit(task(settings), settings)


if __name__ == "__main__":
    launch.run(main, parse)
