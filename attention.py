"""Attention that returns its queries and keys, and can use another ViT's instead.

Queries and keys decide *where* a ViT looks, its attention map:

    map = softmax(q @ k.mT / sqrt(d) + bias)  (B, H, N, N): for each query a distribution over keys
    out = map @ v                             what is there

All methods here are built on this: take a block's q and k, or give it another net's (see vit.py).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from positions import ALL, Places, RelativePositions, rotate


class Attended(NamedTuple):
    """What a block attended with, or is lent; lent None: the block computes its own."""

    q: Tensor | None = None  # (B, H, N, d)
    k: Tensor | None = None  # (B, H, N, d)
    v: Tensor | None = None  # (B, H, N, d of the values)
    bias: Tensor | None = None  # added to the scores: (B, H, N, N), or what broadcasts to it


OWN = Attended()


def lend_map(p: Tensor) -> Attended:
    """Any map (B, H, N, N) as a loan: scores of 0, and a bias whose softmax is the map."""
    zero = p.new_zeros(*p.shape[:-1], 8)  # 8: the least width that every fused kernel takes
    return Attended(q=zero, k=zero, bias=p.log())


def attention_scores(attended: Attended) -> Tensor:
    """q @ k.mT / sqrt(d) + bias: (B, H, N, N)."""
    q, k, _, bias = attended
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    return scores if bias is None else scores + bias


def attention_map(attended: Attended) -> Tensor:
    """The softmax of the scores: (B, H, N, N), for each query a distribution over keys."""
    return attention_scores(attended).softmax(dim=-1)


def attend(attended: Attended) -> Tensor:
    """map @ v: what each query sees, (B, H, N, d of v). A fused kernel never stores the map."""
    q, k, v, bias = attended
    if fused_is_slower(q, v):
        return attention_map(attended) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def fused_is_slower(q: Tensor, v: Tensor) -> bool:
    """On a CPU: in bf16, and where q and k are lent, since it computes their gradients as well."""
    lent = v.requires_grad and not q.requires_grad
    return q.device.type == "cpu" and (lent or q.dtype is torch.bfloat16)


class Attention(nn.Module):
    def __init__(
        self,
        dim: int,
        heads: int,
        relative: RelativePositions | None = None,
        prefix: int = 1,
        rope: bool = False,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is no multiple of the number of heads {heads}")
        self.heads, self.prefix = heads, prefix  # prefix: tokens that are no patches
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative = relative
        # A bias of keys shifts all scores of a query alike, so no map depends on it, unless rope
        # turns it; with rope there is none, as in DINOv3.
        biased = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(dim) if rope else None
        self.register_buffer("biased", biased, persistent=False)

    def forward(
        self, x: Tensor, given: Attended = OWN, places: Places = ALL
    ) -> tuple[Tensor, Attended]:  # x: (B, N, D)
        attended = self.complete(x, given, places)
        y = attend(attended)
        return self.proj(rearrange(y, "b h n d -> b n (h d)")), attended

    def complete(self, x: Tensor, given: Attended, places: Places = ALL) -> Attended:
        """`given`, with missing q, k, v computed from x. A lent map brings its own bias."""
        lacking = [part for part in range(3) if given[part] is None]
        if not lacking:
            return given
        first = lacking[0]
        own = self.project(x, first, lacking[-1] + 1, places)
        q, k, v = (own[i - first] if i in lacking else given[i] for i in range(3))
        lent = given.q is not None and given.k is not None
        bias = given.bias if lent or self.relative is None else self.relative(places)
        return Attended(q, k, v, bias)

    def project(self, x: Tensor, first: int, end: int, places: Places = ALL) -> tuple[Tensor, ...]:
        """Parts first, ..., end - 1 of (query, key, value), and no other: each (B, H, N, d)."""
        rows = slice(first * x.shape[-1], end * x.shape[-1])
        bias = self.qkv.bias if self.biased is None else self.qkv.bias * self.biased
        parts = F.linear(x, self.qkv.weight[rows], bias[rows])
        parts = rearrange(parts, "b n (p h d) -> p b h n d", p=end - first, h=self.heads)
        if places.angles is None:
            return parts.unbind()
        return tuple(
            part if i == 2 else rotate(part, places.angles, self.prefix)
            for i, part in enumerate(parts, first)
        )

    def queries_keys(self, x: Tensor, places: Places = ALL) -> Attended:
        """What decides where it looks, and nothing else, without gradient."""
        q, k = self.project(x, 0, 2, places)
        bias = self.relative(places).detach() if self.relative else None
        return Attended(q.detach(), k.detach(), bias=bias)
