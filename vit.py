"""A Vision Transformer whose blocks say what they attended with, and can be told with what.

Queries and keys decide *where* a ViT looks: map = softmax(q k' / sqrt(d)). Here they go out of
every block, and another ViT's may come in. Everything this repository does with attention is built
on that one seam:

    for x, attended in vit.run(images): ...     # of each block: its tokens, and its q, k, v
    logits = vit(images, given=theirs)          # each block attends with what is given to it

Pre-norm blocks, a class token, and a head that reads the mean of the patch tokens (Dosovitskiy et
al. 2021; He et al. 2022, section 4). Parameter names are timm's and MAE's, so their files load here
and ours load there.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SIZES = {  # name: width, depth, heads
    "micro": (64, 4, 4),  # for the built-in 12x12 digits
    "mini": (128, 6, 4),  # for small photographs
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


class Attended(NamedTuple):
    """What a block attended with. In a loan, q, k or v that is None stays the block's own."""

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
    """q k' / sqrt(d) + bias: (B, H, N, N)."""
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
    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is no multiple of the number of heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, given: Attended = OWN) -> tuple[Tensor, Attended]:  # x: (B, N, D)
        attended = self.complete(x, given)
        y = attend(attended)
        return self.proj(rearrange(y, "b h n d -> b n (h d)")), attended

    def complete(self, x: Tensor, given: Attended) -> Attended:
        """`given`, with those of q, k, v that it lacks computed from the tokens."""
        lacking = [part for part in range(3) if given[part] is None]
        if not lacking:
            return given
        first = lacking[0]
        own = self.project(x, first, lacking[-1] + 1)
        q, k, v = (own[i - first] if i in lacking else given[i] for i in range(3))
        return Attended(q, k, v, given.bias)

    def project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Parts `first` to `last` of (query, key, value), and no other: (parts, B, H, N, d)."""
        rows = slice(first * x.shape[-1], last * x.shape[-1])
        parts = F.linear(x, self.qkv.weight[rows], self.qkv.bias[rows])
        return rearrange(parts, "b n (p h d) -> p b h n d", p=last - first, h=self.heads)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(mlp * dim))

    def forward(
        self, x: Tensor, given: Attended = OWN, keep: Sequence = (1, 1)
    ) -> tuple[Tensor, Attended]:
        y, attended = self.attn(self.norm1(x), given)
        x = x + keep[0] * y
        return x + keep[1] * self.mlp(self.norm2(x)), attended


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return rearrange(self.proj(images), "b d h w -> b (h w) d")


class ViT(nn.Module):
    """A ViT of `depth` pre-norm blocks over a class token and (image_size / patch)^2 patch tokens.

    images: (B, channels, image_size, image_size), normalised. `classes=0` leaves the head out
    (pre-training). `drop_path` is the largest probability of dropping a branch, reached in the last
    block (Huang et al. 2016).
    """

    def __init__(
        self,
        image_size: int,
        patch: int,
        channels: int,
        classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp: float = 4.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if image_size % patch:
            raise ValueError(
                f"image size {image_size} is no multiple of the patch size {patch}: change one"
            )
        images = dict(image_size=image_size, patch=patch, channels=channels, classes=classes)
        self.architecture = images | dict(dim=dim, depth=depth, heads=heads, mlp=mlp)
        self.heads, self.drop_path = heads, drop_path
        self.patch_embed = PatchEmbed(patch, channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp) for _ in range(depth))
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes) if classes else nn.Identity()
        self.apply(initialise)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def tokens(self) -> int:
        return self.pos_embed.shape[1]

    def forward(
        self,
        images: Tensor,
        given: Iterable[Attended | None] = (),
        drop_path_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, classes); `given` and `drop_path_mask` as in `through`."""
        return self.classify(self.encode(self.embed(images), given, drop_path_mask))

    def encode(
        self, x: Tensor, given: Iterable[Attended | None] = (), drop_path_mask=None
    ) -> Tensor:
        """Tokens (B, N, D) through all blocks."""
        for made, _ in self.through(x, given, drop_path_mask):
            x = made
        return x

    def run(self, images: Tensor, given: Iterable[Attended | None] = (), drop_path_mask=None):
        """Block by block: the tokens (B, 1 + N, D) that it made, and what it attended with."""
        return self.through(self.embed(images), given, drop_path_mask)

    def through(
        self,
        x: Tensor,
        given: Iterable[Attended | None] = (),
        drop_path_mask: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Attended]]:
        """Sends tokens (B, N, D) through all blocks, one at each step of this generator.

        The i-th of `given` is lent to block i; None, or the end of `given`, leaves it its own. Two
        ViTs can walk side by side: `given` is asked for block i only when it is the turn of block
        i, and nothing is held longer. The mask of drop path is drawn here if training and not
        given.
        """
        if drop_path_mask is None:
            drop_path_mask = self.draw_drop_path_mask(len(x), x.device)
        for i, (block, loan) in enumerate(zip_longest(self.blocks, given)):
            if block is None:
                raise ValueError(f"more is given than the {len(self.blocks)} blocks can take")
            x, attended = block(x, loan or OWN, of_block(drop_path_mask, i))
            yield x, attended

    def queries_keys(
        self, images: Tensor, layers: Collection[int], drop_path_mask: Tensor | None = None
    ) -> Iterator[Attended | None]:
        """Block by block, ready to be lent: q and k of `layers`, without gradient; else None.

        Ends with the last of `layers`, of which no value, no MLP and no later block is computed.
        """
        last = max(layers)
        x = self.embed(images)
        for i, block in enumerate(self.blocks[:last]):
            x, (q, k, *_) = block(x, OWN, of_block(drop_path_mask, i))
            yield Attended(q.detach(), k.detach()) if i in layers else None
        block = self.blocks[last]
        yield Attended(*block.attn.project(block.norm1(x), 0, 2).detach())

    def embed(self, images: Tensor) -> Tensor:
        """Images to tokens (B, 1 + N, D), the class token first, each with its position added."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        cls = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls.expand(len(x), -1, -1), x], dim=1)

    def classify(self, x: Tensor) -> Tensor:
        """The tokens of the last block to logits (B, classes)."""
        return self.head(self.fc_norm(x[:, 1:].mean(dim=1)))

    def draw_drop_path_mask(self, batch: int, device) -> Tensor | None:
        """Drop path's coin flips (depth, 2 branches, B): 0 drops the branch, else 1 / P(kept).

        None if nothing is dropped: in evaluation, or without drop path.
        """
        if not (self.training and self.drop_path):
            return None
        depth = len(self.blocks)
        kept = 1 - torch.linspace(0, self.drop_path, depth, device=device)[:, None, None]
        return (torch.rand(depth, 2, batch, device=device) < kept) / kept

    def layer_of(self, name: str) -> int:
        """The layer of a parameter: 0 the embedding, 1..depth the blocks, then the head."""
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        if name.startswith(("patch_embed", "cls_token", "pos_embed")):
            return 0
        return len(self.blocks) + 1


def of_block(drop_path_mask: Tensor | None, i: int) -> Sequence:
    """The factors of block i's two branches, each (B, 1, 1)."""
    return (1, 1) if drop_path_mask is None else drop_path_mask[i, :, :, None, None]


def initialise(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases, as MAE has them (after the official JAX ViT)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):  # a patch embedding is a Linear over the pixels of a patch
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)


def build(
    size: str, *, image_size: int, patch: int, channels: int, classes: int, drop_path: float = 0.0
) -> ViT:
    """A randomly initialised ViT of one of SIZES."""
    if size not in SIZES:
        raise ValueError(f"no ViT is called '{size}': choose one of {', '.join(SIZES)}")
    dim, depth, heads = SIZES[size]
    return ViT(image_size, patch, channels, classes, dim, depth, heads, drop_path=drop_path)
