"""LoLCATs for a ViT: softmax attention becomes linear in two steps.

Zhang et al., ICLR 2025 (arXiv 2410.10254). Linear attention never makes a map
of N x N. With feature maps phi,

    out = phi(q) (phi(k)' v) / (phi(q) sum of phi(k))

costs N, not N^2. Step 1 is attention transfer. All weights of a fine-tuned ViT
are frozen, and phi learns to give each layer the output of its softmax (mean
squared error, section 3.1). Step 2 is LoRA. A low-rank change of q, k, v and
the projection learns from the labels (section 3.2). It has step 1's rate, but
for --lr: after transfer a tenth is better (study: related-linear). phi is
Hedgehog's. Left out, as this is a ViT: softmax over the nearest 64 tokens, and
causality.

    python -m related.linear_attention             1, fine-tunes a ViT first
    python -m related.linear_attention --lora --out runs/lora       2, after 1
    python -m related.linear_attention --lora --teacher runs/.../model.pt
                      with a fine-tuned ViT: 2 without 1, the control
"""

import copy
import sys
from dataclasses import dataclass, replace
from functools import partial

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.utils import parametrize

import data
import finetune
import recipes
import train
from common import checkpoints, launch
from common.settings import merge_recipes, parse_settings, setting
from teachers import find
from teachers.load import build_vit
from vit import QK, Attention, ViT, attend


@dataclass(frozen=True)
class Settings(recipes.Settings):
    data: str = setting("digits", "data set", tuple(recipes.DATA_SETS))
    teacher: str = setting(
        "auto", "a ViT with a head, or for --lora the result of step 1 (auto: made here)", free=True
    )
    normalization: str = setting("", recipes.NORMALIZATION, ("", *recipes.NORMALIZATIONS))
    unused = "positions", "drop_path"  # the ViT is made already
    lora: bool = setting(False, "step 2: only a low-rank change learns")
    rank: int = setting(8, "rank of the change of a matrix", low=1)

    @property
    def method(self) -> str:
        return "lora" if self.lora else "linear"


SHARED = dict(drop_path=0.0, weight_decay=0.0)
PHOTOS = SHARED | dict(warmup=0.1, final_lr=1e-4)
RECIPES = merge_recipes(
    recipes.RECIPES,
    digits=SHARED | dict(epochs=60, blr=0.0512, eval_every=20),
    cifar=PHOTOS | dict(epochs=10, blr=5e-3),
    imagenet=PHOTOS | dict(epochs=2, warmup=0.0, blr=1.25e-3),
    folder=PHOTOS | dict(epochs=10, blr=0.04),
)
parse = partial(parse_settings, __doc__, Settings, RECIPES)
FEATURES = "features."  # feature maps in a file, by the block. No ViT has weights of that name


class LinearAttention(nn.Module):
    """The weights of a softmax attention, and feature maps for its queries and keys."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention
        begin = torch.eye(attention.dim // attention.heads).repeat(2, attention.heads, 1, 1)
        self.features = nn.Parameter(begin + 0.02 * torch.randn_like(begin))  # of q, of k

    def forward(self, x: Tensor, given: QK | None = None) -> tuple[Tensor, QK]:
        q, k, v = self.attention.project(x)
        qk = given or self.attention.queries_keys(q, k)
        y = rearrange(self.attend(qk, v), "b h n d -> b n (h d)")
        return self.attention.proj(y), qk

    def attend(self, qk: QK, v: Tensor) -> Tensor:
        """What each query finds: (B, H, N, d), as vit.attend, but linear in N."""
        q, k = (map_features(x, w) for x, w in zip(qk[:2], self.features, strict=True))
        held = einsum(k, v, "b h n f, b h n d -> b h f d")
        weight = einsum(q, k.sum(dim=2), "b h n f, b h f -> b h n")
        return einsum(q, held, "b h n f, b h f d -> b h n d") / weight[..., None]


def map_features(x: Tensor, w: Tensor) -> Tensor:
    """phi: (B, H, N, d) to (B, H, N, 2 d), positive (Zhang et al. 2024, "The Hedgehog")."""
    x = einsum(x, w, "b h n d, h d f -> b h n f")
    y = torch.cat([x.softmax(dim=-1), (-x).softmax(dim=-1)], dim=-1)
    return y.clamp_min(1e-12)  # as by the authors: a query that is like no key would get 0 / 0


class LoRA(nn.Module):
    """A matrix of parts, each with a change of low rank that begins as 0 (Hu et al. 2022)."""

    def __init__(self, weight: Tensor, parts: int, rank: int):
        super().__init__()
        out, into = weight.shape
        self.down = nn.Parameter(torch.randn(parts, rank, into) * into**-0.5)
        self.up = nn.Parameter(torch.zeros(parts, out // parts, rank))
        self.scale = 16 / rank  # alpha as in LoLCATs

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down).flatten(0, 1)


def linearise(net: ViT) -> ViT:
    """Gives a ViT linear attention. All but its feature maps is frozen."""
    net.requires_grad_(False)
    for block in net.blocks:
        block.attn = LinearAttention(block.attn)
    return net


def add_lora(net: ViT, rank: int) -> None:
    """Adds what step 2 learns. All else is frozen."""
    net.requires_grad_(False)
    for block in net.blocks:
        attention = block.attn.attention
        for layer, parts in ((attention.qkv, 3), (attention.proj, 1)):
            change = LoRA(layer.weight, parts, rank).to(layer.weight.device)
            parametrize.register_parametrization(layer, "weight", change)
            layer.parametrizations.weight.original.requires_grad_(False)


def transfer_loss(student: ViT, images, labels, teacher: ViT):
    """Squared error of each layer's output, after softmax attention in all layers before."""
    x, losses = teacher.embed(images), []
    for block, ours in zip(teacher.blocks, student.blocks, strict=True):
        (v,) = block.attn.project(block.norm1(x), "v")
        x, qk = block(x)
        error = (ours.attn.attend(qk, v) - attend(qk, v)).square()  # (B, H, N, d)
        losses.append(error.sum(dim=2).mean())  # summed over tokens: equation 6
    return sum(losses) / len(losses), {}


def task(settings: Settings, dataset: data.Data) -> train.Task:
    checkpoint, device = find_teacher(settings, dataset), dataset.train.device
    weights = checkpoint.weights
    taught = [value for name, value in weights.items() if name.startswith(FEATURES)]
    plain = {k: v for k, v in weights.items() if not k.startswith(FEATURES)}
    teacher, student = (
        build_vit(replace(checkpoint, weights=plain), dataset.image_size) for _ in range(2)
    )
    teacher.to(device).eval().requires_grad_(False)
    torch.manual_seed(settings.seed)
    student = linearise(student).to(device)
    loss = partial(transfer_loss, teacher=teacher)
    if settings.lora:
        for block, features in zip(student.blocks, taught, strict=False):  # none: as they begin
            block.attn.features.data.copy_(features)
        add_lora(student, settings.rank)
        loss = partial(finetune.loss, smoothing=settings.smoothing)
    return train.Task(student, dataset, loss=loss, export=export, checkpoint=checkpoint)


def find_teacher(settings: Settings, dataset: data.Data) -> checkpoints.Checkpoint:
    """The named ViT, or one made here first. It brings feature maps if it was taught any."""
    if settings.teacher == "auto":
        script = sys.modules[__name__] if settings.lora else finetune
        size = dict(model=settings.model, patch=settings.patch)
        made = find.make_teacher(script, settings, dataset, **size)
        settings = replace(settings, teacher=str(made))
    found, count = find.find_teacher(settings, dataset), len(dataset.classes)
    head = found and (found.architecture["classes"], found.classes or dataset.classes)
    if head != (count, dataset.classes):
        raise ValueError(f"{settings.teacher} has no head for the {count} classes of these images")
    if found.method == "linear" and not settings.lora:
        raise ValueError(f"{settings.teacher} has feature maps already: --lora goes on with them")
    return found


def export(net: ViT) -> dict:
    """The ViT with softmax attention, and its feature maps."""
    whole = copy.deepcopy(net)
    features = {f"{FEATURES}{i}": block.attn.features for i, block in enumerate(whole.blocks)}
    for block in whole.blocks:
        block.attn = block.attn.attention
        for layer in (block.attn.qkv, block.attn.proj):
            if parametrize.is_parametrized(layer):
                parametrize.remove_parametrizations(layer, "weight")
    found = checkpoints.export(whole)
    return found | {"model": found["model"] | features}


def main(settings: Settings) -> dict:
    if not settings.lora and settings.given & {"rank", "smoothing"}:
        raise ValueError("--rank and --smoothing have no effect without --lora")
    return train.fit(task(settings, data.load(settings)), settings)


if __name__ == "__main__":
    launch.run(main, parse)
