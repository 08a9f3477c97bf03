"""Human-to-robot attention transfer: after a few words the robot looks elsewhere.

Song, Peng, Luo and Liu (arXiv 2002.04242). We know only the abstract. A human
who sees a robot fail says a reminder. Networks turn it into where to look, and
that into what to do instead. This script is our own simulation. A scene holds
four digits, two of them even. The robot fetches even ones, and cannot know which
of the two is wanted. The reminder names the digit, its place, or its neighbour:

    words -> query,  map = softmax(query . patches / sqrt(d))    where to look
    own judgement of each place + MLP(scene, map @ patches)      what to do
    loss = action + weight * KL(map that lies on the right place | map)

    python -m related.reminders
    python -m related.reminders --reminder words --out runs/words     no looking
    python -m related.reminders --reminder beside --out runs/beside   a map unused
    python -m related.reminders --reminder none --out runs/none  the robot alone

The test has scenes of other digits, with phrasings that were never heard. In
training a tenth of the words is not understood, so that new ones do no harm.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

import data
import recipes
import train
from common import checkpoints, launch, pictures, runs
from common.augment import hash_seed, seeded
from common.settings import merge_recipes, parse_settings, setting
from datasets import digits, sources
from related import scenes
from teachers.load import new_vit
from vit import QK, ViT

REMINDERS = "attention", "beside", "words", "none"


@dataclass(frozen=True)
class Settings(recipes.Settings):
    method = "reminders"
    unused = """image_size holdout num_labels distractors scene dial classes label crop_area flip
        randaugment random_erase mixup cutmix smoothing layer_decay recipe""".split()
    data: str = setting("digits", "data set of the scenes: digits", ("digits",))
    reminder: str = setting("attention", "what it is for: " + ", ".join(REMINDERS), REMINDERS)
    attention_weight: float = setting(5.0, "weight of the loss of the map")
    digits: int = setting(100, "digits in the scenes of training", low=100, high=997)
    scenes: int = setting(4000, "scenes to train on, each with one reminder", low=100)


RECIPES = merge_recipes(
    recipes.RECIPES,
    digits=dict(
        num_labels=0, patch=scenes.PLACE // 2, epochs=14, warmup=0.0714, batch=100, blr=5.12e-3,
        weight_decay=0.05,
    ),
)  # fmt: skip
parse = partial(parse_settings, __doc__, Settings, RECIPES)


class Reader(nn.Module):
    """What words ask for: (B, words) to (B, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.embed = nn.Embedding(2 + len(scenes.VOCABULARY), dim)
        self.order = nn.Parameter(torch.zeros(scenes.LONGEST, dim))
        how = dict(dropout=0.0, batch_first=True, norm_first=True)
        self.block = nn.TransformerEncoderLayer(dim, 4, 2 * dim, **how)

    def forward(self, words: Tensor) -> Tensor:
        nothing = words == scenes.NOTHING
        x = self.block(self.embed(words) + self.order, src_key_padding_mask=nothing)
        return x.masked_fill(nothing[..., None], 0).sum(dim=1) / (~nothing).sum(1, keepdim=True)


class Robot(nn.Module):
    """Sees a scene, and judges what lies at each of nine places. A reminder corrects that."""

    def __init__(self, vit: ViT, reminder: str):
        super().__init__()
        self.vit, self.reminder, dim = vit, reminder, vit.config.dim
        self.judge = nn.Linear(dim, 1, bias=False)  # a bias of all places would change nothing
        self.reader = self.correct = None
        if reminder != "none":
            self.reader = Reader(dim)
            self.correct = nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, 9))

    def forward(self, images: Tensor, words: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the places (B, 9). Where it looks, as log of a map (B, patches)."""
        tokens = self.vit.fc_norm(self.vit.forward_features(images))
        whole, patches = tokens[:, 0], tokens[:, self.vit.config.num_prefix_tokens :]
        side = math.isqrt(patches.shape[1]) // 3
        lying = reduce(patches, "b (r y c x) d -> b (r c) d", "mean", r=3, c=3, y=side)
        alone = self.judge(lying)[..., 0]
        if not self.reader:
            return alone, None
        asked, log_map = self.reader(words), None
        if self.reminder in ("attention", "beside"):
            qk = QK(asked[:, None, None], patches[:, None])  # one head, one query
            log_map = qk.scores().log_softmax(dim=-1)[:, 0, 0]
        if self.reminder == "attention":
            asked = (log_map.exp()[:, None] @ patches)[:, 0]
        return alone + self.correct(torch.cat([whole, asked], dim=-1)), log_map


def locate_patches(patches: int) -> Tensor:
    """Which of the nine places each patch of a grid is a part of: (patches,)."""
    side = round(patches**0.5)
    line = torch.arange(side) * 3 // side
    return (3 * line[:, None] + line).flatten()


def map_loss(log_map: Tensor, targets: Tensor) -> Tensor:
    """KL divergence of maps spread over the right place from maps (B, patches), in nats."""
    right = locate_patches(log_map.shape[1]).to(targets.device) == targets[:, None]
    p = right / right.sum(dim=1, keepdim=True)
    return F.kl_div(log_map, p, reduction="batchmean")


def loss(net: Robot, images: Tensor, which: Tensor, known: scenes.Scenes, weight: float):
    """`which`: numbers of the scenes."""
    logits, log_map = net(images, known.words[which])
    terms = {"action": F.cross_entropy(logits, known.targets[which])}
    if log_map is not None:
        terms["map"] = weight * map_loss(log_map, known.targets[which])
    return sum(terms.values()), terms


def task(settings: Settings) -> train.Task:
    device = launch.get_device(settings.device)
    known, kind = make_trial("train", settings, device), recipes.DATA_SETS["digits"]
    labels = torch.arange(len(known.targets), device=device)
    source = sources.Tensors(known.pictures, labels)  # their numbers stand in for labels
    view = data.Train(source, lambda x, _: x, settings, 9, device)
    names = [f"{row} {column}" for row in scenes.ROWS for column in scenes.COLUMNS]
    dataset = data.Data(names, known.pictures.shape[-1], kind.mean, kind.std, view)
    torch.manual_seed(settings.seed)
    net = Robot(new_vit(settings, dataset, classes=0), settings.reminder).to(device)
    own_loss = partial(loss, known=known, weight=settings.attention_weight)
    return train.Task(net, dataset, own_loss, predict=None, export=export)


def make_trial(name: str, settings: Settings, device) -> scenes.Scenes:
    """Scenes of "train", or of "test": of other digits, the same ones for all runs."""
    images, labels = digits.read_parts("cpu")[name]
    if name == "test":
        made = scenes.make_scenes(1000, images, labels, scenes.NEW, hash_seed("trial"))
    else:
        seed = settings.seed if settings.subset_seed < 0 else settings.subset_seed
        few = torch.randperm(len(images), generator=seeded("reminders", seed))[: settings.digits]
        how = scenes.KNOWN, hash_seed("scenes", seed), 0.1
        made = scenes.make_scenes(settings.scenes, images[few], labels[few], *how)
    return scenes.Scenes(*(x.to(device) for x in made[:3]), made.said)


def test(net: Robot, settings: Settings, dataset: data.Data) -> dict[str, Tensor]:
    """For each scene of the test the right place, and where the robot goes and looks."""
    trial = make_trial("test", settings, dataset.train.device)
    logits, log_map = net(trial.pictures, trial.words)
    found = {"predicted": logits.argmax(dim=1), "labels": trial.targets}
    if log_map is not None:
        places = locate_patches(log_map.shape[1]).to(log_map.device)
        found["looked"] = places[log_map.argmax(dim=1)]
        if launch.rank() == 0:
            pictures.save(draw(trial, log_map), runs.get_folder(settings) / "reminders.png")
    return found


def draw(trial: scenes.Scenes, log_map: Tensor):
    """Some scenes, what was said, and where the robot then looked."""
    side = math.isqrt(log_map.shape[1])
    fig, axes = pictures.figure(2, 4, 8, 4.3)
    for axis, p, scene, said in zip(axes.flat, log_map.exp().cpu(), *trial[::3], strict=False):
        pictures.draw_overlay(axis, scene[0].cpu(), p.view(side, side), p.max().item())
        axis.set(xticks=[], yticks=[])
        axis.set_title(said, fontsize=9)
    return fig


def export(net: Robot) -> dict:
    return checkpoints.export(net.vit) | {"robot": net.state_dict(), "reminder": net.reminder}


def main(settings: Settings) -> dict:
    own = task(settings)
    return train.fit(own, settings, test=partial(test, settings=settings, dataset=own.data))


if __name__ == "__main__":
    launch.run(main, parse)
