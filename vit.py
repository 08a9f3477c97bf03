"""A Vision Transformer whose blocks say where they look, and can be told where to look.

Queries and keys decide *where* a ViT looks: map = softmax(q k' / sqrt(d)). Here they go out of every block, and another
ViT's may come in. Everything this repository does with attention is built on that one seam:

    logits, looks = student(images)                       # looks: the (q, k) that each block looked with
    logits, looks = student(images, qk=teacher_looks)     # the student looks where the teacher looks

Pre-norm blocks, class token, mean pooling over patch tokens (Dosovitskiy et al. 2021; He et al. 2022, section 4).
Parameter names are timm's and MAE's, so their files load here and ours load there.
"""

import pickle
import urllib.error
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SIZES = {  # name: width, depth, heads
    "micro": (64, 4, 4),  # for the built-in 12x12 digits
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
# The teachers of the paper, as their authors publish them: --teacher mae. "huge" has patches of 14 pixels.
MAE_WEIGHTS = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_{}.pth"

QK = tuple[Tensor, Tensor]  # queries and keys of one block, each (B, H, N, d)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v, where d is the width of q's heads: what each query sees, (B, H, N, width of v's heads)."""
    lent = v.requires_grad and not q.requires_grad  # for which a fused kernel finds gradients of q and k all the same
    if q.device.type == "cpu" and (lent or q.dtype is torch.bfloat16):  # where a CPU's fused kernel is the slower one
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is no multiple of the number of heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Parts `first` to `last` of (query, key, value), and no other: (parts, B, H, N, d)."""
        rows = slice(first * x.shape[-1], last * x.shape[-1])
        parts = F.linear(x, self.qkv.weight[rows], self.qkv.bias[rows])
        return rearrange(parts, "b n (p h d) -> p b h n d", p=last - first, h=self.heads)

    def forward(self, x: Tensor, qk: QK | None = None) -> tuple[Tensor, QK]:  # x: (B, N, D)
        if qk is None:
            q, k, v = self.project(x, 0, 3)  # where to look: our own choice
        else:
            (q, k), (v,) = qk, self.project(x, 2, 3)  # lent: only what is seen there is ours
        y = attend(q, k, v)
        return self.proj(rearrange(y, "b h n d -> b n (h d)")), (q, k)


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

    def forward(self, x: Tensor, qk: QK | None = None, keep: Sequence = (1, 1)) -> tuple[Tensor, QK]:
        y, qk = self.attn(self.norm1(x), qk)
        x = x + keep[0] * y
        return x + keep[1] * self.mlp(self.norm2(x)), qk


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return rearrange(self.proj(images), "b d h w -> b (h w) d")


class ViT(nn.Module):
    """A ViT of `depth` pre-norm blocks over a class token and (image_size / patch)^2 patch tokens.

    images: (B, channels, image_size, image_size), normalised. `classes=0` leaves the head out (pre-training).
    `drop_path` is the largest probability of dropping a branch, reached in the last block (Huang et al. 2016).
    """

    def __init__(self, image_size: int, patch: int, channels: int, classes: int,
                 dim: int, depth: int, heads: int, mlp: float = 4.0, drop_path: float = 0.0):  # fmt: skip
        super().__init__()
        if image_size % patch:
            raise ValueError(f"image size {image_size} is no multiple of the patch size {patch}: change one of them")
        self.architecture = dict(image_size=image_size, patch=patch, channels=channels, classes=classes,
                                 dim=dim, depth=depth, heads=heads, mlp=mlp)  # fmt: skip
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

    def forward(self, images: Tensor, qk: Sequence[QK | None] = (), keep: Tensor | None = None):
        """Logits (B, classes), and the (q, k) that each block looked with.

        `qk[i]` lends block i another ViT's queries and keys; None, or a list that ends before i, leaves it its own.
        `keep` are drop path's coin flips (see `draw_keep`), drawn here if training and not given.
        """
        keep = self.draw_keep(len(images), images.device) if keep is None else keep
        x, looks = self.encode(self.embed(images), qk, keep)
        return self.head(self.fc_norm(x[:, 1:].mean(dim=1))), looks

    def look(self, images: Tensor, layers: Iterable[int], keep: Tensor | None = None) -> list[QK | None]:
        """The (q, k) of `layers` (None for others), ready to be lent, with no operation beyond the last of them."""
        last = max(layers)
        x, looks = self.encode(self.embed(images), keep=keep, depth=last)
        block = self.blocks[last]
        looks.append(tuple(block.attn.project(block.norm1(x), 0, 2)))  # no values, no MLP
        return [qk if i in layers else None for i, qk in enumerate(looks)]

    def embed(self, images: Tensor) -> Tensor:
        """Images to tokens (B, 1 + N, D), the class token first, each with its position added."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        cls = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls.expand(len(x), -1, -1), x], dim=1)

    def encode(self, x: Tensor, qk: Sequence[QK | None] = (), keep: Tensor | None = None, depth: int | None = None):
        """Tokens (B, N, D) through the first `depth` blocks (all of them if None)."""
        looks = []
        for i, block in enumerate(self.blocks[:depth]):
            flips = (1, 1) if keep is None else keep[i, :, :, None, None]
            x, look = block(x, qk[i] if i < len(qk) else None, flips)
            looks.append(look)
        return x, looks

    def draw_keep(self, batch: int, device) -> Tensor | None:
        """Drop path's coin flips (depth, 2 branches, B): 0 drops the branch for an image, else 1 / P(kept)."""
        if not (self.training and self.drop_path):
            return None
        kept = 1 - torch.linspace(0, self.drop_path, len(self.blocks), device=device)[:, None, None]
        return (torch.rand(len(self.blocks), 2, batch, device=device) < kept) / kept

    def layer_of(self, name: str) -> int:
        """Which layer a parameter belongs to, for layer decay: 0 the embedding, 1..depth the blocks, then the head."""
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return 0 if name.startswith(("patch_embed", "cls_token", "pos_embed")) else len(self.blocks) + 1


def initialise(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases, as MAE (models_mae.py) and the paper's JAX models have them."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):  # a patch embedding is a Linear over the pixels of a patch
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)


def build(size: str, *, image_size: int, patch: int, channels: int, classes: int, drop_path: float = 0.0) -> ViT:
    """A randomly initialised ViT of one of SIZES."""
    if size not in SIZES:
        raise ValueError(f"no ViT is called '{size}': choose one of {', '.join(SIZES)}")
    dim, depth, heads = SIZES[size]
    return ViT(image_size, patch, channels, classes, dim, depth, heads, drop_path=drop_path)


def parse_layers(text: str, depth: int) -> list[int]:
    """Block numbers from '18' (the first 18), '6-11' or '0,2,4-7' (these, counted from 0), or 'all'."""
    try:
        if text == "all":
            layers = list(range(depth))
        elif text.isdigit():
            layers = list(range(int(text)))
        else:
            spans = [part.split("-", 1) for part in text.split(",")]
            layers = sorted({i for span in spans for i in range(int(span[0]), int(span[-1]) + 1)})
    except ValueError:
        raise ValueError(f"--layers {text}: write a count (18), a range (6-11), a list (0,2,4-7) or 'all'") from None
    if not layers or layers[-1] >= depth:
        raise ValueError(f"--layers {text}: choose at least one of this model's {depth} layers (0 to {depth - 1})")
    return layers


def check_loan(teacher: ViT, student: ViT, layers: Sequence[int]) -> None:
    """ValueError unless the teacher can look at the student's images, with maps of the same shape. Widths may differ."""
    ours, theirs = ({"heads": net.heads, "tokens": net.tokens, "channels": net.architecture["channels"]}
                    for net in (student, teacher))  # fmt: skip
    for what, count in ours.items():
        if count != theirs[what]:
            raise ValueError(f"the teacher has {theirs[what]} {what} and the student {count}: choose --model, --patch, "
                             "--data or --teacher so that they agree")  # fmt: skip
    if layers[-1] >= len(teacher.blocks):
        raise ValueError(f"--layers goes up to layer {layers[-1]}, but the teacher has {len(teacher.blocks)} layers")


# Checkpoints -----------------------------------------------------------------------------------------------------------


def read(source: str | Path) -> dict:
    """A checkpoint from a path or URL as {"model": state dict, ...}: ours, MAE's, or a plain state dict.

    Nothing in the file is executed. ValueError if it is not a checkpoint of a ViT, FileNotFoundError if it is not there.
    """
    source = str(source)
    try:
        if source.startswith(("http://", "https://")):  # a hash in the file's name (name-1a2b3c4d.pth) is checked
            found = torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True, check_hash=True)
        elif not Path(source).is_file():
            raise FileNotFoundError(f"no checkpoint at {source}")
        else:
            found = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except urllib.error.URLError as error:
        raise ValueError(f"cannot download {source} ({error.reason}): fetch it elsewhere and name the file") from error
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{source} is no checkpoint that can be read safely: it is cut short, or holds more than "
                         f"tensors ({type(error).__name__}: {str(error)[:80]})") from error  # fmt: skip
    if isinstance(found, dict):
        found = next(({**found, "model": found[key]} for key in ("model", "state_dict") if key in found),
                     {"model": found})  # fmt: skip
    if not isinstance(found, dict) or not isinstance(found["model"], dict) or "cls_token" not in found["model"]:
        raise ValueError(f"{source} holds no ViT: there is no 'cls_token' among its keys")
    return {**found, "source": source}


def load(checkpoint: dict, *, image_size: int | None = None, classes: int | None = None, drop_path: float = 0.0) -> ViT:
    """The ViT of a checkpoint (see `read`), at its own or another image size (positions are interpolated bicubically).

    With `classes`, the head is made anew for so many; without, the file's own head must fit. What the file has
    beyond a ViT of this kind (MAE's decoder, the final norm before pooling) is left; anything else is refused with a
    ValueError that names the keys and shapes.
    """
    weights = {k: v for k, v in checkpoint["model"].items() if not k.startswith(("decoder", "mask_token", "norm."))}
    arch = checkpoint.get("architecture") or infer_architecture(weights, checkpoint["source"])
    if not isinstance(arch, dict) or not {"image_size", "classes"} <= arch.keys():
        raise ValueError(f"{checkpoint['source']} describes no ViT that could be built ({arch})")
    image_size = image_size or arch["image_size"]
    if classes is not None or not arch["classes"]:  # a new head, and the norm before it if the file has none
        weights = {k: v for k, v in weights.items() if not k.startswith("head.")}
    try:
        vit = ViT(**{**arch, "image_size": image_size, "classes": classes or arch["classes"]}, drop_path=drop_path)
    except (TypeError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"{checkpoint['source']} describes no ViT that could be built ({error})") from error
    if "pos_embed" in weights:
        weights["pos_embed"] = interpolate(weights["pos_embed"], vit.tokens)

    own = vit.state_dict()
    fresh = [k for k in own if k.startswith(("head.", "fc_norm.")) and (classes is not None or not arch["classes"])]
    differ = [f"{k} is missing" for k in own if k not in weights and k not in fresh]
    differ += [f"{k} is not ours" for k in weights if k not in own]
    differ += [f"{k} is {tuple(weights[k].shape)}, not {tuple(own[k].shape)}"
               for k in own if k in weights and weights[k].shape != own[k].shape]  # fmt: skip
    if differ:
        more = f", and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise ValueError(f"{checkpoint['source']} is not a plain ViT: " + "; ".join(differ[:4]) + more)
    vit.load_state_dict(weights, strict=False)
    return vit


def infer_architecture(weights: dict, source: str) -> dict:
    """What the shapes of a plain state dict tell; the number of heads they do not, so the size must be a known one."""
    try:
        dim, channels, patch, _ = weights["patch_embed.proj.weight"].shape
        depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
        tokens, hidden = weights["pos_embed"].shape[1] - 1, len(weights["blocks.0.mlp.fc1.weight"])
        classes = len(weights["head.weight"]) if "head.weight" in weights else 0
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source} is not a plain ViT: {error} is missing") from None
    heads = next((h for w, n, h in SIZES.values() if (w, n) == (dim, depth)), None)
    if heads is None:
        raise ValueError(f"{source} is a ViT of width {dim} and depth {depth}, whose number of heads is unknown")
    return dict(image_size=round(tokens**0.5) * patch, patch=patch, channels=channels, classes=classes,
                dim=dim, depth=depth, heads=heads, mlp=hidden / dim)  # fmt: skip


def interpolate(pos_embed: Tensor, tokens: int) -> Tensor:
    """Position embeddings (1, 1 + g*g, D) for another square grid of patches, by bicubic interpolation."""
    if pos_embed.shape[1] == tokens:
        return pos_embed
    cls, grid = pos_embed[:, :1], pos_embed[:, 1:]
    if round(grid.shape[1] ** 0.5) ** 2 != grid.shape[1]:
        raise ValueError(f"{grid.shape[1]} position embeddings form no square grid of patches")
    side, new = round(grid.shape[1] ** 0.5), round((tokens - 1) ** 0.5)
    grid = rearrange(grid, "one (h w) d -> one d h w", h=side).float()
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([cls, rearrange(grid, "one d h w -> one (h w) d").to(cls.dtype)], dim=1)
