"""What families of public ViTs add to a plain one, each by overriding a method of vit.py.

Rope changes where a token looks, so a teacher lends queries and keys that have turned.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vit as plain


@dataclass(frozen=True)
class Config(plain.Config):  # the defaults are those of a plain ViT
    class_token: bool = True
    registers: int = 0  # further tokens that are no patches (Darcet et al. 2024)
    positions: str = "absolute"  # or rope
    rope_base: float = 100.0  # the longest period of rope
    norm_pre: bool = False  # a norm before the blocks (CLIP)
    layer_scale: float = 0.0  # initial factor of each branch (Touvron et al. 2021), 0: none
    activation: str = "gelu"  # or quick_gelu, swiglu
    pool: str = "mean"  # what a public head reads, or token: the class token, norms: mean of norms

    @property
    def num_prefix_tokens(self) -> int:
        return self.class_token + self.registers


class RopeQKV(plain.QKV):
    """Keys have no bias, which rope would turn."""

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        q, k, v = self.bias.chunk(3)
        return F.linear(x, self.weight[rows], torch.cat([q, torch.zeros_like(k), v])[rows])


class RopeAttention(plain.Attention):
    """Queries and keys turn with their position (Su et al. 2021, in 2d as DINOv3).

    Half of the pairs of channels turn with the row, half with the column, both in -1..1.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.qkv = RopeQKV(config.dim, 3 * config.dim)
        self.num_prefix_tokens, width = config.num_prefix_tokens, config.dim // config.heads
        line = (torch.arange(config.grid_size) + 0.5) / config.grid_size * 2 - 1
        periods = config.rope_base ** (torch.arange(width // 4) / (width // 4))
        angles = 2 * math.pi * torch.cartesian_prod(line, line)[:, :, None] / periods
        self.angles = nn.Buffer(angles.flatten(1), persistent=False)  # (patches, d / 2)

    def queries_keys(self, q: Tensor, k: Tensor) -> plain.QK:
        return plain.QK(self.rotate(q), self.rotate(k))

    def rotate(self, x: Tensor) -> Tensor:  # patches of (B, H, N, d): channel i with i + d / 2
        first, rest = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        cos, sin = self.angles.cos().to(x.dtype), self.angles.sin().to(x.dtype)
        a, b = rest.chunk(2, dim=-1)
        return torch.cat([first, torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)], dim=2)


class QuickMlp(plain.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        return self.fc2(y * torch.sigmoid(1.702 * y))


class SwiGLU(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        hidden = int(config.mlp * config.dim)
        self.fc1, self.fc2 = nn.Linear(config.dim, 2 * hidden), nn.Linear(hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


POSITIONS = {"absolute": plain.Attention, "rope": RopeAttention}
ACTIVATIONS = {"gelu": plain.Mlp, "quick_gelu": QuickMlp, "swiglu": SwiGLU}


class Block(plain.Block):
    def __init__(self, config: Config):
        super().__init__(config, POSITIONS[config.positions], ACTIVATIONS[config.activation])
        scale = LayerScale if config.layer_scale else nn.Identity
        self.ls1, self.ls2 = scale(config), scale(config)

    def forward(self, x: Tensor, given=None, factors=(1, 1)) -> tuple[Tensor, plain.QK]:
        y, qk = self.attn(self.norm1(x), given)
        x = x + factors[0] * self.ls1(y)
        return x + factors[1] * self.ls2(self.mlp(self.norm2(x))), qk


class ViT(plain.ViT):
    block = Block

    def add_tokens(self) -> None:
        config, dim = self.config, self.config.dim
        positions = config.class_token + config.grid_size**2
        counts = {"cls_token": int(config.class_token), "reg_token": config.registers}
        counts["pos_embed"] = positions if config.positions == "absolute" else 0
        for name, count in counts.items():
            token = nn.init.trunc_normal_(torch.empty(1, count, dim), std=0.02)
            self.register_parameter(name, nn.Parameter(token) if count else None)
        self.norm_pre = nn.LayerNorm(dim, eps=config.eps) if config.norm_pre else nn.Identity()

    def embed(self, images: Tensor) -> Tensor:
        x, cls, positions = self.embed_patches(images), self.cls_token, self.pos_embed
        if positions is not None:
            x = x + positions[:, -x.shape[1] :]
            cls = None if cls is None else cls + positions[:, :1]
        first = [token for token in (cls, self.reg_token) if token is not None]
        return self.norm_pre(torch.cat([*(t.expand(len(x), -1, -1) for t in first), x], dim=1))

    def classify(self, x: Tensor) -> Tensor:
        if self.config.pool == "mean":
            return super().classify(x)
        x = x[:, :1] if self.config.pool == "token" else x[:, self.config.num_prefix_tokens :]
        return self.head(self.fc_norm(x).mean(dim=1))
