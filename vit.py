"""A plain Vision Transformer whose attention can be observed and replaced.

`for x, qk in net.blockwise(images)` gives each block's tokens, and its queries and keys.
`net(images, given=teacher.lend(images, layers))` attends with a teacher's queries and keys.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    image_size: int  # pixels per side
    patch: int  # pixels per side
    channels: int
    classes: int  # 0: no head
    dim: int
    depth: int
    heads: int
    mlp: float = 4.0  # hidden width of an MLP, as a multiple of dim
    eps: float = 1e-6  # of the layer norms
    mean: tuple[float, ...] = (0.0,)  # per channel, of the pixels it was trained on
    std: tuple[float, ...] = (1.0,)  # likewise: a ViT normalises its images itself
    num_prefix_tokens = 1  # tokens before the patches: the class token

    @property
    def grid_size(self) -> int:  # patches per side
        return self.image_size // self.patch


class QK(NamedTuple):  # where a block looks: map = softmax(q @ k.mT / sqrt(d) + bias)
    q: Tensor  # (B, H, N, d)
    k: Tensor  # (B, H, N, d)
    bias: Tensor | None = None  # (1 or B, H, N, N)

    def scores(self) -> Tensor:
        scores = (self.q * self.q.shape[-1] ** -0.5) @ self.k.mT
        return scores if self.bias is None else scores + self.bias

    def map(self) -> Tensor:  # (B, H, N, N): for each query a distribution over keys
        return self.scores().softmax(dim=-1)

    @staticmethod
    def from_map(p: Tensor) -> "QK":  # a QK whose map is p: scores are 0, the bias is log p
        zeros = p.new_zeros(*p.shape[:-1], 8)  # fused kernels want a width of 8
        return QK(zeros, zeros, p.log())


def attend(qk: QK, v: Tensor) -> Tensor:
    """map @ v: what each query finds, (B, H, N, d). The fused kernel never stores the map."""
    lent = v.requires_grad and not qk.q.requires_grad  # the kernel would compute q's gradient
    if v.is_cpu and (lent or v.dtype is torch.bfloat16):  # here the plain form is faster
        return qk.map() @ v
    return F.scaled_dot_product_attention(qk.q, qk.k, v, qk.bias)


class QKV(nn.Linear):  # tokens (B, N, D) to q, k, v (B, N, 3 D), or to `rows` of the weight alone
    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        return F.linear(x, self.weight[rows], self.bias[rows])


class Attention(nn.Module):  # tokens (B, N, D) to tokens, and the QK they attended with
    def __init__(self, config: Config):
        super().__init__()
        self.dim, self.heads = config.dim, config.heads
        self.qkv = QKV(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def project(self, x: Tensor, which: str = "qkv") -> Tensor:  # (3, B, H, N, d), or fewer
        rows = {"qkv": slice(None), "qk": slice(2 * self.dim), "v": slice(2 * self.dim, None)}
        y = self.qkv(x, rows[which])  # an adapter in its place (LoRA) must accept rows, too
        return rearrange(y, "b n (p h d) -> p b h n d", h=self.heads, d=self.dim // self.heads)

    def queries_keys(self, q: Tensor, k: Tensor) -> QK:
        return QK(q, k)  # families (teachers/vit.py) add rope here

    def forward(self, x: Tensor, given: QK | None = None) -> tuple[Tensor, QK]:
        if given is None:
            q, k, v = self.project(x)
            qk = self.queries_keys(q, k)
        else:  # attention copy
            qk, v = given, self.project(x, "v")[0]
        return self.proj(rearrange(attend(qk, v), "b h n d -> b n (h d)")), qk


class Mlp(nn.Sequential):  # (B, N, D) to (B, N, D)
    def __init__(self, config: Config):
        hidden = int(config.mlp * config.dim)
        fc1, fc2 = nn.Linear(config.dim, hidden), nn.Linear(hidden, config.dim)
        super().__init__(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))


class Block(nn.Module):  # pre-norm
    def __init__(self, config: Config, attention=Attention, mlp=Mlp):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps)
        self.attn = attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps)
        self.mlp = mlp(config)

    def forward(self, x: Tensor, given=None, factors=(1, 1)) -> tuple[Tensor, QK]:
        y, qk = self.attn(self.norm1(x), given)
        x = x + factors[0] * y  # drop path's factors: (B, 1, 1) each, or 1
        return x + factors[1] * self.mlp(self.norm2(x)), qk


class ViT(nn.Module):  # pixels in 0..1 (B, C, H, W) to logits (B, classes), named as in timm
    block = Block  # families of public ViTs have others: teachers/vit.py

    def __init__(self, config: Config, drop_path: float = 0.0):  # rate of the last block
        super().__init__()
        self.config, self.drop_path = config, drop_path
        self.mean = nn.Buffer(torch.tensor(config.mean)[:, None, None], persistent=False)
        self.std = nn.Buffer(torch.tensor(config.std)[:, None, None], persistent=False)
        proj = nn.Conv2d(config.channels, config.dim, config.patch, stride=config.patch)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.blocks = nn.ModuleList(self.block(config) for _ in range(config.depth))
        self.fc_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.head = nn.Linear(config.dim, config.classes) if config.classes else nn.Identity()
        self.apply(initialise)
        self.add_tokens()

    def add_tokens(self) -> None:  # --positions sincos replaces the random ones
        tokens, dim = 1 + self.config.grid_size**2, self.config.dim
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, dim), std=0.02))

    def normalise(self, pixels: Tensor) -> Tensor:
        c, s, found = self.config.channels, self.config.image_size, [*pixels.shape]
        if found[1:] != [c, s, s] or not pixels.is_floating_point():
            raise ValueError(f"needs pixels in 0..1, {c} x {s} x {s}, not {pixels.dtype} {found}")
        return (pixels - self.mean) / self.std

    def embed_patches(self, images: Tensor) -> Tensor:
        return rearrange(self.patch_embed(self.normalise(images)), "b d h w -> b (h w) d")

    def embed(self, images: Tensor) -> Tensor:  # to tokens (B, N, D), the class token first
        x = self.embed_patches(images) + self.pos_embed[:, 1:]
        cls = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls.expand(len(x), -1, -1), x], dim=1)

    def blockwise(self, images, given=None, factors=None):
        """Each block's tokens (B, N, D) and QK. `given`: for each a QK, or None for its own."""
        x = self.embed(images)
        given = [None] * len(self.blocks) if given is None else given
        factors = self.draw_drop_path(len(x)) if factors is None else factors
        for block, theirs, pair in zip(self.blocks, given, factors, strict=True):
            x, qk = block(x, theirs, pair)
            yield x, qk

    def forward_features(self, images: Tensor, *args, **kwargs) -> Tensor:  # the last tokens
        for x, _ in self.blockwise(images, *args, **kwargs):
            pass
        return x

    def forward(self, images: Tensor, given=None, factors=None) -> Tensor:
        return self.classify(self.forward_features(images, given, factors))

    def classify(self, x: Tensor) -> Tensor:  # as in MAE (He et al. 2022, appendix A.1)
        return self.head(self.fc_norm(x[:, self.config.num_prefix_tokens :].mean(dim=1)))

    def lend(self, images: Tensor, layers, factors=None):
        """Each block's QK, None outside `layers`: a generator, for one pass of a student."""
        x, last = self.embed(images), max(layers)
        for i, block in enumerate(self.blocks[:last]):
            x, qk = block(x, None, (1, 1) if factors is None else factors[i])
            yield qk if i in layers else None
        block = self.blocks[last]  # lends its queries and keys, so the rest of it need not run
        yield block.attn.queries_keys(*block.attn.project(block.norm1(x), "qk"))
        yield from [None] * (len(self.blocks) - last - 1)

    def draw_drop_path(self, batch: int):
        """Factors (depth, 2, B, 1, 1): 0 drops a branch, 1 / P(kept) keeps it (Huang 2016)."""
        if not (self.training and self.drop_path):
            return [(1, 1)] * len(self.blocks)
        depth, device = len(self.blocks), self.fc_norm.weight.device
        kept = 1 - torch.linspace(0, self.drop_path, depth, device=device)[:, None, None]
        return ((torch.rand(depth, 2, batch, device=device) < kept) / kept)[..., None, None]


def initialise(module: nn.Module) -> None:  # as in MAE: Xavier, patch embeddings as matrices
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.get_parameter("bias"))
