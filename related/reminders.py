"""Human-to-robot attention transfer: a few words, and the robot looks elsewhere.

Song, Peng, Luo and Liu (arXiv 2002.04242), of which only the abstract is known
to us. A human who sees a robot fail says a reminder; stacked networks make of
it where to look, and of that what to do instead. They report how often the
attention lands right (73.7 %) and how many failures are avoided (66.9 %). This
is a simulation in kind. In a scene lie four digits, two of them even. The robot
fetches even ones, and cannot know which of the two is wanted. The reminder says
what it is, where it lies, or beside what, in one of many phrasings:

    words -> query,  map = softmax(query . patches / sqrt(d))    where to look
    own judgement of each place + MLP(scene, map @ patches)      what to do
    loss = action + weight * KL(map that lies on the right place | map)

    python -m related.reminders
    python -m related.reminders --reminder words --out runs/words  nothing looks
    python -m related.reminders --reminder none --out runs/none  the robot alone

Tested on scenes of other digits, with phrasings that were never heard. In
training a tenth of the words is not understood, so that new ones are borne.
"""

import launch
from launch import print0

import math
from functools import partial

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

import checkpoints
import data
import digits
import pictures
import runs
import train
from attention import Attended, attention_scores
from augment import Normalise, number, seeded
from related import dino, scenes
from settings import MODEL, RUN, TRAINING, Setting, Settings, change, parse_settings
from vit import ViT

SETTINGS = change(
    {"data": Setting("digits", "what the scenes are of", choices=("digits",))}
    | {k: v for k, v in (MODEL | TRAINING | RUN).items() if k not in ("drop_path", "eval_every")},
    patch=scenes.PLACE // 2, epochs=14, warmup=1, batch=100, lr=2e-3, weight_decay=0.05,
) | {
    "reminder": Setting("attention", "what it is for", choices=("attention", "words", "none")),
    "attention_weight": Setting(5.0, "of the loss of the map"),
    "subset_seed": Setting(-1, "draws digits and scenes to train on (-1: --seed does)", low=-1),
    "digits": Setting(100, "from which the scenes of training are made", 50, 997),
    "scenes": Setting(4000, "to train on, each with one reminder", low=100),
}  # fmt: skip
parse = partial(parse_settings, __doc__, SETTINGS)

# Who hears it -------------------------------------------------------------------------------------


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
    """Sees a scene, and judges what lies at each of nine places; a reminder corrects that."""

    def __init__(self, vit: ViT, reminder: str):
        super().__init__()
        self.vit, self.reminder, dim = vit, reminder, vit.config.dim
        self.judge = nn.Linear(dim, 1, bias=False)  # one of all places would change nothing
        self.reader = self.correct = None
        if reminder != "none":
            self.reader = Reader(dim)
            self.correct = nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, 9))

    def forward(self, images: Tensor, words: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of the places (B, 9); where it looks, as log of a map (B, patches)."""
        tokens = self.vit.fc_norm(self.vit.encode(self.vit.embed(images)))
        whole, patches = tokens[:, 0], tokens[:, self.vit.config.prefix :]
        side = math.isqrt(patches.shape[1]) // 3
        lying = reduce(patches, "b (r y c x) d -> b (r c) d", "mean", r=3, c=3, y=side)
        alone = self.judge(lying)[..., 0]
        if not self.reader:
            return alone, None
        asked, log_map = self.reader(words), None
        if self.reminder == "attention":
            attended = Attended(asked[:, None, None], patches[:, None])  # one head, one query
            log_map = attention_scores(attended).log_softmax(dim=-1)[:, 0, 0]
            asked = (log_map.exp()[:, None] @ patches)[:, 0]
        return alone + self.correct(torch.cat([whole, asked], dim=-1)), log_map


def places(patches: int) -> Tensor:
    """Which of the nine places each patch of a grid is a part of: (patches,)."""
    side = round(patches**0.5)
    line = torch.arange(side) * 3 // side
    return (3 * line[:, None] + line).flatten()


def map_loss(log_map: Tensor, targets: Tensor) -> Tensor:
    """KL divergence of maps (B, patches) from such as are spread over the right place, in nats."""
    right = places(log_map.shape[1]).to(targets.device) == targets[:, None]
    p = right / right.sum(dim=1, keepdim=True)
    return F.kl_div(log_map, p, reduction="batchmean")


def loss(net: Robot, images: Tensor, which: Tensor, known: scenes.Scenes, weight: float):
    """`which`: numbers of the scenes."""
    logits, log_map = net(images, known.words[which])
    terms = {"action": F.cross_entropy(logits, known.targets[which])}
    if log_map is not None:
        terms["map"] = weight * map_loss(log_map, known.targets[which])
    return terms, {}


# Training and trial -------------------------------------------------------------------------------


def task(settings: Settings) -> train.Task:
    """Everything that train.fit needs."""
    device = launch.device(settings.device)
    normalise = Normalise(data.KINDS["digits"].normalization, device)
    known = trial_of("train", settings, device)
    labels = torch.arange(len(known.targets), device=device)
    source = data.Tensors(known.pictures, labels)  # their numbers stand in for labels
    view = data.Train(source, lambda x, _: normalise(x), settings, 9, device)
    names = [f"{row} {column}" for row in scenes.ROWS for column in scenes.COLUMNS]
    dataset = data.Data(names, 1, known.pictures.shape[-1], normalise, view)
    if dataset.image_size % (3 * settings.patch):
        raise ValueError(f"--patch {settings.patch}: does not divide a place, of {scenes.PLACE}")
    torch.manual_seed(settings.seed)
    net = Robot(dino.encoder(settings, dataset), settings.reminder).to(device)
    return train.Task(
        "reminders",
        net,
        dataset,
        loss=partial(loss, known=known, weight=settings.attention_weight),
        test=partial(tested, settings=settings, dataset=dataset),
        export=export,
    )


def trial_of(name: str, settings: Settings, device) -> scenes.Scenes:
    """Scenes of "train", or of "test": of other digits, the same ones for all runs."""
    split = digits.Split(0, Normalise(data.KINDS["digits"].normalization, device), device)
    images, labels = (x.cpu() for x in split.whole(name))
    if name == "test":
        made = scenes.make(1000, images, labels, scenes.NEW, number("trial"))
    else:
        seed = settings.seed if settings.subset_seed < 0 else settings.subset_seed
        few = torch.randperm(len(images), generator=seeded("reminders", seed))[: settings.digits]
        own = number("scenes", seed)
        made = scenes.make(settings.scenes, images[few], labels[few], scenes.KNOWN, own, 0.1)
    return scenes.Scenes(*(x.to(device) for x in made[:3]), made.said)


def tested(net: Robot, settings: Settings, dataset: data.Data) -> dict[str, Tensor]:
    """Of each scene of the test the right place, and the one that is gone to, and looked at."""
    trial = trial_of("test", settings, dataset.train.device)
    logits, log_map = net(dataset.normalise(trial.pictures), trial.words)
    found = {"predicted": logits.argmax(dim=1), "labels": trial.targets}
    if log_map is not None:
        found["looked"] = places(log_map.shape[1]).to(log_map.device)[log_map.argmax(dim=1)]
        lands = train.top1(found["looked"], trial.targets)
        print0(f"attention lands where it should for {lands:.1f} % of the reminders")
        if launch.rank() == 0:
            drawn = draw(trial, log_map)
            pictures.save(drawn, runs.folder(settings, "reminders") / "reminders.png")
    return found


def draw(trial: scenes.Scenes, log_map: Tensor):
    """Some scenes, what was said, and where that made the robot look."""
    side = math.isqrt(log_map.shape[1])
    fig, axes = pictures.figure(2, 4, 8, 4.3)
    for axis, p, scene, said in zip(axes.flat, log_map.exp().cpu(), *trial[::3], strict=False):
        pictures.overlay(axis, scene[0].cpu(), p.view(side, side), p.max().item())
        axis.set(xticks=[], yticks=[])
        axis.set_title(said, fontsize=9)
    return fig


def export(net: Robot) -> dict:
    return checkpoints.export(net.vit) | {"robot": net.state_dict(), "reminder": net.reminder}


def main(settings: Settings) -> dict:
    runs.check(settings, "reminders")
    return train.fit(task(settings), settings)


if __name__ == "__main__":
    launch.run(main, parse)
