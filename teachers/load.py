"""Opens any ViT: open_model("runs/.../model.pt"), or a public one by its name."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import recipes
import vit
from common import checkpoints
from common.checkpoints import Checkpoint
from common.launch import print0
from data import Data
from recipes import NORMALIZATIONS, SIZES
from teachers.adapt import Teacher, adapt
from teachers.positions import make_sincos, resize


def read_checkpoint(source: str | Path, normalization: str = "") -> Checkpoint:
    """A checkpoint by NAME (python -m teachers lists them), path or URL. Nothing in it is run.

    NAME=FILE reads a file as a public ViT's, SIZE=FILE as a plain ViT with the heads of a size.
    `normalization`: of a file that does not name its own (a key of NORMALIZATIONS).
    """
    source = place = str(source)
    model = None
    if not (Path(place).is_file() or re.match("https?://", place)):
        from teachers import zoo

        model, place = zoo.locate(source)
    found = checkpoints.read_file(place)
    if not isinstance(found, dict) or {"optimizer", "run"} <= found.keys():
        raise ValueError(f"{source} is no model: name the model.pt of a run")
    if "architecture" in found:  # ours, whatever it is called
        checkpoint = checkpoints.parse_ours(found, source)
    else:
        from teachers.convert import parse_foreign

        checkpoint = parse_foreign(found, source, place, model)
    architecture = checkpoint.architecture
    if "mean" in architecture:
        if normalization:
            print0(f"note: {source} names its own mean and std, --normalization is for others")
        return checkpoint
    assumed = "imagenet" if architecture["channels"] == 3 else "none"
    if not normalization:
        remedy = f"--normalization {' or '.join(k for k in NORMALIZATIONS if k != assumed)}"
        print0(f"note: {source} names no mean and std, so we take {assumed} ({remedy})")
    architecture["mean"], architecture["std"] = NORMALIZATIONS[normalization or assumed]
    return checkpoint


def build_vit(checkpoint: Checkpoint, image_size=None, classes=None, drop_path=0.0) -> vit.ViT:
    """The ViT of a checkpoint. Positions are interpolated for another image size.

    With `classes` (0: none) the head is new, and reads the patches' mean. Else it is the file's.
    """
    arch, weights = checkpoint.architecture, checkpoint.weights
    new: dict[str, Any] = {"image_size": image_size or arch["image_size"]}
    own_head = classes is None and arch["classes"] > 0
    if not classes:  # the last norm is the file's, too
        weights = {re.sub(r"^norm\.", "fc_norm.", name): value for name, value in weights.items()}
    if own_head:
        if not checkpoint.classes:
            read = "class token" if arch.get("pool") == "token" else "mean of the patches"
            print0(f"note: {checkpoint.source}: its head is taken to read the {read}")
    else:
        arch = {name: value for name, value in arch.items() if name != "pool"}
        new["classes"] = classes or 0
    try:
        net = build(to_config(arch | new), drop_path)
        if net.config.image_size != arch["image_size"] and "pos_embed" in weights:
            positions = resize(weights["pos_embed"], net.config.grid_size, checkpoint.resize)
            weights = weights | {"pos_embed": positions}
        if not own_head:  # it is new, and so is its norm if the file has none
            new = {k: v for k, v in net.state_dict().items() if k.startswith(("head.", "fc_norm."))}
            weights = new | {k: v for k, v in weights.items() if k[:5] not in ("head.", "norm.")}
        net.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:  # a field, or keys and shapes
        raise ValueError(f"{checkpoint.source} is no ViT we know: {str(error)[:400]}") from None
    return net


def build(config: vit.Config, drop_path: float = 0.0, positions: str = "random") -> vit.ViT:
    """A random ViT, plain or of a family. Its positions start at random or as `sincos`."""
    size, patch = config.image_size, config.patch
    if size % patch:
        other = max(1, round(size / patch)) * patch
        raise ValueError(f"--image-size {size} is no multiple of --patch {patch}: try {other}")
    kind = vit.ViT
    if type(config) is not vit.Config:
        from teachers.vit import ViT as kind
    net = kind(config, drop_path)
    if positions == "sincos" and net.pos_embed is not None:
        waves = make_sincos(config.grid_size, config.dim)
        net.pos_embed.data.copy_(waves[:, -net.pos_embed.shape[1] :])
    return net


def to_config(architecture: dict[str, Any]) -> vit.Config:
    """The Config of a plain ViT, unless a field of a family differs from its default."""
    plain = {f.name: architecture[f.name] for f in fields(vit.Config) if f.name in architecture}
    if len(plain) == len(architecture):
        return vit.Config(**plain)
    from teachers.vit import Config

    config = Config(**architecture)
    return vit.Config(**plain) if config == Config(**plain) else config


def make_config(settings: recipes.Settings, dataset: Data, **changes) -> vit.Config:
    """The plain ViT that --model and --patch ask for, for these images and classes."""
    if settings.model not in SIZES:
        raise ValueError(f"--model {settings.model}: choose a size from {', '.join(SIZES)}")
    images = dataset.image_size, settings.patch, len(dataset.mean), len(dataset.classes)
    config = vit.Config(*images, *SIZES[settings.model], mean=dataset.mean, std=dataset.std)
    return replace(config, **changes)


def get_size(settings: recipes.Settings, asked: vit.Config) -> dict[str, int]:
    """What --model and --patch say of a ViT, where they are given."""
    flags = {"dim": "model", "depth": "model", "heads": "model", "patch": "patch"}
    return {name: getattr(asked, name) for name, flag in flags.items() if flag in settings.given}


def new_vit(settings: recipes.Settings, dataset: Data, **changes) -> vit.ViT:
    """A random one, on the CPU. Call torch.manual_seed before."""
    return build(make_config(settings, dataset, **changes), settings.drop_path, settings.positions)


@dataclass
class Model:
    """A trained ViT of any method. A student of attention copy brings its teacher."""

    net: vit.ViT
    checkpoint: Any = None  # a Checkpoint; None for a random net
    teacher: Teacher | None = None
    layers: Sequence[int] = ()

    def __call__(self, images: Tensor) -> Tensor:  # logits (B, classes)
        return self.net(images, self.borrow(images))

    def blockwise(self, images: Tensor) -> Iterator:
        return self.net.blockwise(images, self.borrow(images))

    def borrow(self, images: Tensor) -> Iterator | None:
        if not -0.5 < images.min() <= images.max() < 1.5:  # interpolation may leave 0..1 a little
            raise ValueError("needs pixels in 0..1: a ViT here normalises them itself")
        return self.teacher.lend(images, self.layers) if self.teacher else None


def open_model(
    source: str | Path | Checkpoint, device="cpu", image_size=None, normalization: str = ""
) -> Model:
    """A checkpoint as a Model, frozen, at its own or another image size."""
    found = source if isinstance(source, Checkpoint) else read_checkpoint(source, normalization)
    nets = [build_vit(one, image_size).to(device) for one in (found, found.teacher) if one]
    net, *teachers = (one.eval().requires_grad_(False) for one in nets)
    lender = adapt(*teachers, net, found.layers, **found.adapted) if teachers else None
    return Model(net, found, lender, found.layers)
