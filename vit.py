"""A Vision Transformer whose blocks return their queries, keys and values, and can use another's.

    for x, attended in vit.run(images): ...     # of each block: its tokens, and its q, k, v
    logits = vit(images, given=theirs)          # each block attends with what is given to it

Pre-norm blocks, a class token, and a head that reads the mean of the patch tokens (Dosovitskiy et
al. 2021; He et al. 2022, section 4). Parameter names are timm's and MAE's, so their files load here
and ours load there. (`places` serves rope and relative positions only: skip it at first.)
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attention import OWN, Attended, Attention
from positions import ALL, Places, RelativePositions, rope_angles

SIZES = {  # name: width, depth, heads
    "nano": (32, 2, 4),  # a student of the next
    "micro": (64, 4, 4),  # for the built-in 12x12 digits
    "mini": (128, 6, 4),  # for small photographs
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


@dataclass(frozen=True)
class Config:
    """Sizes of a ViT, and what families of teachers add to a plain one: the defaults are the plain.

    Only what changes the function is here. What is only another name, or a zero (a bias that is
    missing, a class token without a position), is made ours when a file is read.
    """

    image_size: int  # pixels a side
    patch: int
    channels: int
    classes: int  # 0: no head
    dim: int
    depth: int
    heads: int
    mlp: float = 4.0  # hidden width of an MLP, over dim
    class_token: bool = True
    registers: int = 0  # more tokens that are no patches (Darcet et al. 2024)
    positions: str = "absolute"  # any of absolute, relative, rope, joined by +
    rope_base: float = 100.0  # the longest period of rope (Su et al. 2021; DINOv3: in 2d, -1..1)
    norm_pre: bool = False  # a norm before the blocks (CLIP)
    layer_scale: float = 0.0  # what the factors of branches begin with (Touvron 2021); 0: none
    activation: str = "gelu"  # quick_gelu, swiglu
    eps: float = 1e-6  # of the norms

    def check(self) -> None:
        """ValueError if there can be no such ViT."""
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if field.type is float else (field.type,)
            if type(value) not in kinds:
                raise ValueError(f"{field.name} {value!r} is no {field.type.__name__}")
            may_be_0 = field.name in ("classes", "registers", "layer_scale")
            if type(value) in (int, float) and not (0 < value <= 1e5 or (may_be_0 and value == 0)):
                least = "at least" if may_be_0 else "above"
                raise ValueError(f"{field.name} {value}: must be {least} 0, and at most 100,000")
        if int(self.mlp * self.dim) < 1:
            raise ValueError(f"mlp {self.mlp}: an MLP of no width")
        for what in self.positions.split("+"):
            if what not in ("absolute", "relative", "rope"):
                raise ValueError(f"positions '{what}': choose from absolute, relative, rope")
        if "relative" in self.positions and self.prefix != 1:
            raise ValueError("relative positions are of patches and one class token, no more")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation '{self.activation}': choose from {known}")
        if self.image_size % self.patch:
            raise ValueError(
                f"image size {self.image_size} is no multiple of the patch size {self.patch}: "
                "change one"
            )

    @property
    def side(self) -> int:
        return self.image_size // self.patch

    @property
    def prefix(self) -> int:
        """Tokens that are no patches, the class token first."""
        return self.class_token + self.registers

    @property
    def tokens(self) -> int:
        return self.prefix + self.side**2


class Mlp(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        hidden, self.activation = int(config.mlp * config.dim), ACTIVATIONS[config.activation]
        gates = 2 if config.activation == "swiglu" else 1
        self.fc1 = nn.Linear(config.dim, gates * hidden)
        self.fc2 = nn.Linear(hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu, "swiglu": swiglu}


class LayerScale(nn.Module):
    def __init__(self, dim: int, first: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), first))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        dim, scale = config.dim, config.layer_scale
        self.norm1 = nn.LayerNorm(dim, eps=config.eps)
        relative = None
        if "relative" in config.positions:
            relative = RelativePositions(config.side, config.heads)
        rope = "rope" in config.positions
        self.attn = Attention(dim, config.heads, relative, config.prefix, rope)
        self.ls1 = LayerScale(dim, scale) if scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=config.eps)
        self.mlp = Mlp(config)
        self.ls2 = LayerScale(dim, scale) if scale else nn.Identity()

    def forward(
        self,
        x: Tensor,
        given: Attended = OWN,
        keep: Sequence = (1, 1),
        places: Places = ALL,
    ) -> tuple[Tensor, Attended]:
        y, attended = self.attn(self.norm1(x), given, places)
        x = x + keep[0] * self.ls1(y)
        return x + keep[1] * self.ls2(self.mlp(self.norm2(x))), attended


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return rearrange(self.proj(images), "b d h w -> b (h w) d")


class ViT(nn.Module):
    """A ViT of `depth` pre-norm blocks over the tokens of Config: class token, registers, patches.

    images: (B, channels, image_size, image_size), normalised. `drop_path` is the largest
    probability of dropping a branch, reached in the last block (Huang et al. 2016).
    """

    def __init__(self, config: Config, drop_path: float = 0.0):
        super().__init__()
        config.check()
        self.config, self.drop_path = config, drop_path
        dim = config.dim
        self.patch_embed = PatchEmbed(config.patch, config.channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.reg_token = None
        if config.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, dim))
        self.pos_embed = None
        if "absolute" in config.positions:
            places = config.class_token + config.side**2
            self.pos_embed = nn.Parameter(torch.zeros(1, places, dim))
        angles = None
        if "rope" in config.positions:
            angles = rope_angles(config.side, dim // config.heads, config.rope_base)
        self.register_buffer("angles", angles, persistent=False)
        self.norm_pre = nn.LayerNorm(dim, eps=config.eps) if config.norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.fc_norm = nn.LayerNorm(dim, eps=config.eps)
        self.head = nn.Linear(dim, config.classes) if config.classes else nn.Identity()
        self.apply(initialise)
        for token in (self.cls_token, self.reg_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    def forward(
        self,
        images: Tensor,
        given: Iterable[Attended | None] = (),
        drop_path_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, classes); `given` and `drop_path_mask` as in `through`."""
        return self.classify(self.encode(self.embed(images), given, drop_path_mask))

    def encode(
        self, x: Tensor, given: Iterable[Attended | None] = (), drop_path_mask=None, seen=None
    ) -> Tensor:
        """Tokens (B, N, D) through all blocks; arguments as of `through`."""
        for made, _ in self.through(x, given, drop_path_mask, seen):
            x = made
        return x

    def run(
        self, images: Tensor, given: Iterable[Attended | None] = (), drop_path_mask=None
    ) -> Iterator[tuple[Tensor, Attended]]:
        """Block by block: the tokens (B, N, D) that it made, and what it attended with."""
        return self.through(self.embed(images), given, drop_path_mask)

    def through(
        self,
        x: Tensor,
        given: Iterable[Attended | None] = (),
        drop_path_mask: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Attended]]:
        """Sends tokens (B, N, D) through all blocks, one at each step of this generator.

        The i-th of `given` is lent to block i; None, or the end of `given`, leaves it its own. Two
        ViTs can walk side by side: `given` is asked for block i only when it is the turn of block
        i, and nothing is held longer. The mask of drop path is drawn here if training and not
        given. `seen`: which patches are among the tokens (B, patches), if not all.
        """
        places = self.places(seen)
        if drop_path_mask is None:
            drop_path_mask = self.draw_drop_path_mask(len(x), x.device)
        for i, (block, loan) in enumerate(zip_longest(self.blocks, given)):
            if block is None:
                raise ValueError(f"more is given than the {len(self.blocks)} blocks can take")
            x, attended = block(x, loan or OWN, of_block(drop_path_mask, i), places)
            yield x, attended

    def queries_keys(
        self, images: Tensor, layers: Collection[int], drop_path_mask: Tensor | None = None
    ) -> Iterator[Attended | None]:
        """Block by block, ready to be lent: q and k of `layers`, without gradient; else None.

        Stops at the last of `layers`: there only q and k are computed, and nothing after it.
        """
        last, places = max(layers), self.places()
        x = self.embed(images)
        for i, block in enumerate(self.blocks[:last]):
            x, (q, k, _, bias) = block(x, OWN, of_block(drop_path_mask, i), places)
            bias = None if bias is None else bias.detach()
            yield Attended(q.detach(), k.detach(), bias=bias) if i in layers else None
        block = self.blocks[last]
        yield block.attn.queries_keys(block.norm1(x), places)

    def embed(self, images: Tensor) -> Tensor:
        """Images to tokens (B, prefix + patches, D), each with its position added if it has one."""
        x = self.patch_embed(images)
        if self.pos_embed is not None:
            x = x + self.pos_embed[:, -x.shape[1] :]
        first = []
        if self.cls_token is not None:
            absolute = self.pos_embed is not None
            first.append(self.cls_token + self.pos_embed[:, :1] if absolute else self.cls_token)
        if self.reg_token is not None:
            first.append(self.reg_token)
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in first), x], dim=1)
        return self.norm_pre(x)

    def places(self, seen: Tensor | None = None) -> Places:
        if seen is None or self.angles is None:
            return Places(self.angles, seen)
        return Places(self.angles[seen][:, None], seen)

    def classify(self, x: Tensor) -> Tensor:
        """The tokens of the last block to logits (B, classes)."""
        return self.head(self.fc_norm(x[:, self.config.prefix :].mean(dim=1)))

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
        if name.startswith(("patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre")):
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
