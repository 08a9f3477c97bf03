"""Files of weights: written whole or not at all, read without running anything, opened as a model.

model = open_model("runs/.../model.pt")         # of any method
logits = model(images)
for x, attended in model.run(images): ...       # block by block, as vit.ViT.run
"""

import contextlib
import os
import pickle
import subprocess
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from launch import Failed
from settings import FREE
from vit import Attended, ViT


@dataclass(frozen=True)
class Checkpoint:
    """What a file says of a ViT. `architecture` are the arguments of vit.ViT."""

    source: str
    weights: dict[str, Tensor]
    architecture: dict
    classes: list[str] | None = None
    normalization: tuple[list[float], list[float]] | None = None
    method: str = "?"
    teacher: "Checkpoint | None" = None  # of a student of attention copy: whose maps it uses,
    layers: tuple[int, ...] = ()  # and in which blocks


@dataclass
class Model:
    """A trained ViT of any method, ready to evaluate: one of attention copy brings its teacher."""

    net: ViT
    checkpoint: Checkpoint | None = None
    teacher: ViT | None = None
    layers: tuple[int, ...] = ()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.net(images, self.given(images))

    def run(self, images: Tensor) -> Iterator[tuple[Tensor, Attended]]:
        """Block by block: the tokens (B, 1 + N, D) that it made, and what it attended with."""
        return self.net.run(images, self.given(images))

    def given(self, images: Tensor):
        return self.teacher.queries_keys(images, self.layers) if self.teacher else ()


def open_model(source: str | Path, device="cpu", heads: int = 0) -> Model:
    """The model in a file or at a URL, of any method. Errors as those of `read`."""
    checkpoint = read(source, heads)
    net = load(checkpoint).to(device).eval().requires_grad_(False)
    if not checkpoint.teacher:
        return Model(net, checkpoint)
    teacher = load(checkpoint.teacher).to(device).eval().requires_grad_(False)
    return Model(net, checkpoint, teacher, checkpoint.layers)


# Reading ------------------------------------------------------------------------------------------


def read(source: str | Path, heads: int = 0) -> Checkpoint:
    """A checkpoint from a path or URL: ours, MAE's, or a plain state dict of a ViT.

    `heads`: the number of attention heads, for a file that does not say it. Nothing in the file is
    executed. ValueError if it is not a checkpoint of a ViT, FileNotFoundError if it is not there.
    """
    source = str(source)
    try:
        if source.startswith(("http://", "https://")):
            # A hash in its name (name-1a2b3c4d.pth) is checked.
            fetch = torch.hub.load_state_dict_from_url
            found = fetch(source, map_location="cpu", weights_only=True, check_hash=True)
        elif not Path(source).is_file():
            raise FileNotFoundError(f"no checkpoint at {source}")
        else:
            found = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except urllib.error.URLError as error:
        raise ValueError(
            f"cannot download {source} ({error.reason}): fetch it elsewhere and name the file"
        ) from error
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{source} is no checkpoint that can be read safely: it is cut short, or holds more "
            f"than tensors ({type(error).__name__}: {str(error)[:80]})"
        ) from error
    try:
        return understand(found, source, heads)
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{source} holds no ViT that can be understood ({reason})") from error


def understand(found: object, source: str, heads: int = 0) -> Checkpoint:
    """What was found in a file, as a Checkpoint."""
    about = found if isinstance(found, dict) else {}
    weights = next((about[key] for key in ("model", "state_dict") if key in about), about)
    if not isinstance(weights, dict) or "cls_token" not in weights:
        raise ValueError(f"{source} holds no ViT: there is no 'cls_token' among its keys")
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{source} holds no ViT: not all of its weights are tensors")
    beyond = ("decoder", "mask_token", "norm.")  # MAE's, and the final norm of class-token pooling
    weights = {k: v for k, v in weights.items() if not k.startswith(beyond)}
    architecture = about.get("architecture") or infer_architecture(weights, source, heads)
    if not isinstance(architecture, dict) or not {"image_size", "classes"} <= architecture.keys():
        raise ValueError(f"{source} describes no ViT that could be built ({architecture})")
    known = {k: about[k] for k in ("classes", "normalization", "method") if k in about}
    if about.get("teacher"):
        known["teacher"] = understand(about["teacher"], source)
        known["layers"] = tuple(about["layers"])
    return Checkpoint(source, weights, architecture, **known)


def infer_architecture(weights: dict[str, Tensor], source: str, heads: int) -> dict:
    """What the shapes of a plain state dict tell. The number of heads they do not."""
    try:
        dim, channels, patch, _ = weights["patch_embed.proj.weight"].shape
        depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
        tokens, hidden = weights["pos_embed"].shape[1] - 1, len(weights["blocks.0.mlp.fc1.weight"])
        classes = len(weights["head.weight"]) if "head.weight" in weights else 0
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source} is not a plain ViT: {error} is missing") from None
    if not heads:
        raise ValueError(
            f"{source} does not say how many attention heads it has, and sizes do not tell (width "
            "384 may have 6 or 12): say it with --teacher-heads (or --heads)"
        )
    sizes = dict(
        image_size=round(tokens**0.5) * patch, patch=patch, channels=channels, classes=classes
    )
    return sizes | dict(dim=dim, depth=depth, heads=heads, mlp=hidden / dim)


def load(
    checkpoint: Checkpoint,
    *,
    image_size: int | None = None,
    classes: int | None = None,
    drop_path: float = 0.0,
) -> ViT:
    """The ViT of a checkpoint, at its own or another image size (positions are interpolated).

    With `classes`, the head is made anew for so many (0: no head); without, the file's own head
    must fit. What does not fit is refused with a ValueError that names the keys and shapes.
    """
    arch, weights = checkpoint.architecture, dict(checkpoint.weights)
    new_head = classes is not None or not arch["classes"]
    if new_head:
        weights = {k: v for k, v in weights.items() if not k.startswith("head.")}
    shape = {"image_size": image_size or arch["image_size"]}
    shape["classes"] = arch["classes"] if classes is None else classes
    try:
        vit = ViT(**arch | shape, drop_path=drop_path)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{checkpoint.source} describes no ViT that could be built ({error})"
        ) from error
    if "pos_embed" in weights:
        weights["pos_embed"] = interpolate(weights["pos_embed"], vit.tokens)
    own = vit.state_dict()
    fresh = [k for k in own if new_head and k.startswith(("head.", "fc_norm."))]
    differ = [f"{k} is missing" for k in own if k not in weights and k not in fresh]
    differ += [f"{k} is not ours" for k in weights if k not in own]
    for k in own.keys() & weights.keys():
        if weights[k].shape != own[k].shape:
            differ.append(f"{k} is {tuple(weights[k].shape)}, not {tuple(own[k].shape)}")
    if differ:
        more = f", and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise ValueError(f"{checkpoint.source} is not a plain ViT: " + "; ".join(differ[:4]) + more)
    vit.load_state_dict(weights, strict=False)
    return vit


def interpolate(pos_embed: Tensor, tokens: int) -> Tensor:
    """Position embeddings (1, 1 + g*g, D) for another square grid of patches, bicubically."""
    if pos_embed.shape[1] == tokens:
        return pos_embed
    cls, grid = pos_embed[:, :1], pos_embed[:, 1:]
    side, new = round(grid.shape[1] ** 0.5), round((tokens - 1) ** 0.5)
    if side**2 != grid.shape[1]:
        raise ValueError(f"{grid.shape[1]} position embeddings form no square grid of patches")
    grid = rearrange(grid, "one (h w) d -> one d h w", h=side).float()
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([cls, rearrange(grid, "one d h w -> one (h w) d").to(cls.dtype)], dim=1)


# Writing ------------------------------------------------------------------------------------------


def save(what: dict, path: Path) -> None:
    """Writes a checkpoint whole or not at all: until then, what stood there before stays."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(what, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        kept = f" (what was saved before is intact: {path})" if path.exists() else ""
        raise Failed(f"could not write {path}: {error}. Is the disk full?{kept}") from error


def write_text(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def export(net: ViT) -> dict:
    """What model.pt holds of a ViT. (train.fit adds classes, normalisation and the method.)"""
    return {"model": net.state_dict(), "architecture": net.architecture}


def open_run(settings, name: str) -> tuple[Path, dict | None]:
    """The folder of a run, and the state to go on from. ValueError rather than spoil a run."""
    out = run_folder(settings, name)
    out.mkdir(parents=True, exist_ok=True)
    last = out / "last.pt"
    if not last.exists() or (settings.overwrite and not settings.resume):
        return out, None
    if not settings.resume:
        raise ValueError(
            f"{out} already holds a run: go on with --resume, start over with --overwrite, or "
            "choose another --out"
        )
    try:
        state = torch.load(last, map_location="cpu", weights_only=True)
        before = dict(state["settings"])
    except Exception as error:  # unpickling errors are of many kinds
        raise ValueError(
            f"cannot resume from {last}, which is damaged ({type(error).__name__}): "
            "start over with --overwrite"
        ) from error
    now = {k: v for k, v in vars(settings).items() if k not in FREE}
    differ = [f"{k} was {before.get(k)}, now {v}" for k, v in now.items() if before.get(k) != v]
    if differ:
        raise ValueError(
            f"{out} holds a run with other settings ({'; '.join(differ[:3])}): "
            "choose another --out, or start over with --overwrite"
        )
    return out, state


def run_folder(settings, name: str) -> Path:
    usual = Path("runs") / f"{name}-{settings.data}-{settings.model}-s{settings.seed}"
    return Path(settings.out or usual)


def commit() -> str:
    """The commit of this repository, marked if the code has been changed since."""

    def git(*words: str) -> str:
        how = dict(capture_output=True, text=True, cwd=Path(__file__).parent)
        return subprocess.run(["git", *words], **how).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", "*.py", "digits.npz")
    except OSError:  # no git here
        return "unknown"
    return (head or "unknown") + (" with changes" if changed else "")
