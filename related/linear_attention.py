"""LoLCATs for a ViT: its softmax attention becomes linear, first taught, then mended.

Zhang et al., ICLR 2025 (arXiv 2410.10254). Linear attention never makes a map
of N x N: with feature maps phi,

    out = phi(q) (phi(k)' v) / (phi(q) sum of phi(k))

costs N, not N^2. 1. Attention transfer: all weights of a fine-tuned ViT are
frozen, and phi learns that each layer's output is that of the softmax (mean
squared error, section 3.1). 2. LoRA: a low-rank change of q, k, v and the
projection is learned from the labels (section 3.2). phi is Hedgehog's:
softmax over channels of q W, and of -q W.

    python -m related.linear_attention             1, of a ViT fine-tuned first
    python -m related.linear_attention --lora --out runs/lora       2, after 1
    python -m related.linear_attention --lora --teacher runs/.../model.pt
                      with a fine-tuned ViT: 2 without 1, the control
    python -m speed.linear          images/s over tokens, and where they cross
"""

import launch

import copy
import sys
from dataclasses import asdict, replace
from functools import partial

import torch
from einops import einsum
from torch import Tensor, nn
from torch.nn.utils import parametrize

import checkpoints
import data
import finetune
import runs
import teachers
import train
from attention import OWN, Attended, Attention, attend
from positions import ALL
from settings import COMMON, Setting, Settings, change, parse_settings
from vit import ViT

SETTINGS = change(
    {k: v for k, v in COMMON.items() if k != "drop_path"},
    #             digits cifar imagenet
    epochs=       (60,   10,   2),
    warmup=       (6,    1,    0),
    lr=           (1e-2, 1e-2, 1e-2),
    weight_decay= 0.0,
    eval_every=   (20,   1,    1),
) | {
    "teacher": Setting(
        "auto", "a ViT with a head, or for --lora what the first step left (auto: made here first)",
        free=True,
    ),
    "lora": Setting(False, "the second step: all but the low-rank change is frozen"),
    "rank": Setting(8, "of the change of a matrix", low=1),
}  # fmt: skip
parse = partial(parse_settings, __doc__, SETTINGS)
FEATURES = "features."  # feature maps in a file, by the block; no ViT has weights of that name


class LinearAttention(nn.Module):
    """Attention with the weights of a softmax attention, and feature maps for its queries, keys."""

    def __init__(self, attention: Attention, width: int):
        super().__init__()
        self.attention = attention
        begin = torch.eye(width).repeat(2, attention.heads, 1, 1)
        self.features = nn.Parameter(begin + 0.02 * torch.randn_like(begin))  # of q, of k

    def forward(self, x: Tensor, given: Attended = OWN, places=ALL) -> tuple[Tensor, Attended]:
        attended = self.attention.complete(x, given, places)
        y = self.see(attended).transpose(1, 2).flatten(2)
        return self.attention.proj(y), attended

    def see(self, attended: Attended) -> Tensor:
        """What each query sees: (B, H, N, d), as attention.attend, but linear in N."""
        q, k = (hedgehog(x, w) for x, w in zip(attended[:2], self.features, strict=True))
        held = einsum(k, attended.v, "b h n f, b h n d -> b h f d")
        weight = einsum(q, k.sum(dim=2), "b h n f, b h f -> b h n")
        return einsum(q, held, "b h n f, b h f d -> b h n d") / weight[..., None]


def hedgehog(x: Tensor, w: Tensor) -> Tensor:
    """phi: (B, H, N, d) to (B, H, N, 2 d), positive (Zhang et al. 2024, "The Hedgehog")."""
    x = einsum(x, w, "b h n d, h d f -> b h n f")
    return torch.cat([x.softmax(dim=-1), (-x).softmax(dim=-1)], dim=-1)


class LoRA(nn.Module):
    """A matrix of several parts, each changed by one of low rank that begins as 0.

    Hu et al. 2022; alpha, 16, as in LoLCATs.
    """

    def __init__(self, weight: Tensor, parts: int, rank: int):
        super().__init__()
        out, into = weight.shape
        self.down = nn.Parameter(torch.randn(parts, rank, into) * into**-0.5)
        self.up = nn.Parameter(torch.zeros(parts, out // parts, rank))
        self.scale = 16 / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down).flatten(0, 1)


def linearised(vit: ViT) -> ViT:
    """The same net with linear attention; all but its feature maps is frozen."""
    vit.requires_grad_(False)
    for block in vit.blocks:
        block.attn = LinearAttention(block.attn, vit.config.dim // vit.config.heads)
    return vit


def low_rank(net: ViT, rank: int) -> None:
    """Adds what the second step learns; the rest is frozen."""
    net.requires_grad_(False)
    for block in net.blocks:
        attention = block.attn.attention
        for layer, parts in ((attention.qkv, 3), (attention.proj, 1)):
            change = LoRA(layer.weight, parts, rank).to(layer.weight.device)
            parametrize.register_parametrization(layer, "weight", change)
            layer.parametrizations.weight.original.requires_grad_(False)


def transfer_loss(student: ViT, images, labels, teacher: ViT):
    """Squared error of each layer's output, on what the softmax made of the layers before.

    Summed over tokens; a mean over images, heads, channels and layers.
    """
    with torch.no_grad():
        attended = [used for _, used in teacher.run(images)]
    losses = []
    for block, used in zip(student.blocks, attended, strict=True):
        error = (block.attn.see(used) - attend(used)).square()  # (B, H, N, d)
        losses.append(error.sum(dim=2).mean())  # equation 6
    return {"transfer": sum(losses) / len(losses)}, {}


def task(settings: Settings, dataset: data.Data | None = None) -> train.Task:
    """Everything that train.fit needs. `dataset`: used instead of what the settings name."""
    device = launch.device(settings.device)
    dataset = dataset or data.load(settings, device)
    source = find_teacher(settings, dataset)
    taught = [value for name, value in source.weights.items() if name.startswith(FEATURES)]
    load = partial(checkpoints.load, plain(source), image_size=dataset.image_size)
    teacher, student = load().to(device), load()
    if source.teacher or "relative" in teacher.config.positions:
        raise ValueError(
            f"{source.source}: only a ViT with maps of its own queries and keys, and no biases of "
            "places, can be made linear"
        )
    teacher.eval().requires_grad_(False)
    torch.manual_seed(settings.seed)
    student = linearised(student).to(device)  # and the feature maps that it got
    loss = partial(transfer_loss, teacher=teacher)
    if settings.lora:
        for block, features in zip(student.blocks, taught, strict=False):  # none: as they begin
            block.attn.features.data.copy_(features)
        low_rank(student, settings.rank)
        loss = partial(finetune.loss, settings=settings)
    name = "lora" if settings.lora else "linear"
    return train.Task(
        name,
        student,
        dataset,
        loss=loss,
        predict=finetune.predict,
        export=export,
        teacher=source,
    )


def find_teacher(settings: Settings, dataset: data.Data) -> checkpoints.Checkpoint:
    """The ViT that is named, or made here first; with its feature maps, if it was taught any."""
    path = settings.teacher
    net = {name: getattr(settings, name) for name in ("model", "patch", "components")}
    if path == "auto" and settings.lora:
        path = teachers.make("linear", sys.modules[__name__], settings, dataset, **net)
    elif path == "auto":
        path = teachers.make("finetune", finetune, settings, dataset, **net)
    source = checkpoints.read(path)
    count = len(dataset.classes)
    if source.architecture["classes"] != count or source.classes not in (None, dataset.classes):
        raise ValueError(
            f"--teacher {path}: its head is not of the {count} classes of --data {settings.data}"
        )
    dataset.adopt(source)
    return source


def plain(source: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
    others = {k: v for k, v in source.weights.items() if not k.startswith(FEATURES)}
    return replace(source, weights=others)


def export(net: ViT) -> dict:
    """The ViT with softmax attention that this was, or would be; and its feature maps."""
    whole = copy.deepcopy(net)
    features = {f"{FEATURES}{i}": block.attn.features for i, block in enumerate(whole.blocks)}
    for block in whole.blocks:
        block.attn = block.attn.attention
        for layer in (block.attn.qkv, block.attn.proj):
            if parametrize.is_parametrized(layer):
                parametrize.remove_parametrizations(layer, "weight")
    return {"model": whole.state_dict() | features, "architecture": asdict(whole.config)}


def main(settings: Settings) -> dict:
    runs.check(settings, "lora" if settings.lora else "linear")
    return train.fit(task(settings), settings)


if __name__ == "__main__":
    launch.run(main, parse)
