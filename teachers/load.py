"""Opens any ViT: a run's model.pt, a public one by name, or the file of another.

>>> model = open_model("runs/.../model.pt")  # of any method
>>> logits = model(images)
>>> for x, qk in model.blockwise(images): ...  # as vit.ViT.blockwise
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

import vit
from common import checkpoints
from common.checkpoints import Checkpoint
from common.launch import print0


def read_checkpoint(source: str | Path) -> Checkpoint:
    """A checkpoint by NAME (python -m teachers lists them), path or URL. Nothing in it is run.

    NAME=FILE reads a file as a public ViT's, SIZE=FILE as a plain ViT with the heads of a size.
    ValueError if it holds no ViT, FileNotFoundError if it is not there.
    """
    source = place = str(source)
    named, model, size = not (checkpoints.is_url(place) or Path(place).is_file()), None, None
    if named:
        from teachers import zoo

        name, _, file = place.partition("=")
        if file and name in zoo.ALL_SIZES:
            size, place = zoo.ALL_SIZES[name], file
        else:
            model, place = zoo.locate(place)
    found = checkpoints.read_file(place)
    about = found if isinstance(found, dict) else {}
    if "optimizer" in about and "run" in about:
        raise ValueError(f"{source} is the state of a run: name the model.pt beside it")
    if "architecture" in about:  # ours, whatever it is called
        return checkpoints.parse_ours(found, source)
    from teachers import convert, zoo

    model = model if named else zoo.recognise(place)
    for note in zoo.list_notes(model) if model else ():
        print0(f"note: {note}")
    return convert.parse_foreign(about, source, model, size)


def build_vit(
    checkpoint: Checkpoint,
    image_size: int | None = None,
    classes: int | None = None,
    drop_path: float = 0.0,
) -> vit.ViT:
    """The ViT of a checkpoint. Positions are interpolated for another image size.

    With `classes` the head is new, for so many (0: no head). Otherwise it is the file's.
    ValueError, which names keys and shapes, if the file does not fit.
    """
    arch, weights = checkpoint.architecture, checkpoint.weights
    new_head = classes is not None or not arch["classes"]
    classes = arch["classes"] if classes is None else classes
    sizes = dict(image_size=image_size or arch["image_size"], classes=classes)
    net = build(to_config(arch | sizes), drop_path)
    if sizes["image_size"] != arch["image_size"]:
        from teachers.positions import resize_all

        weights = resize_all(weights, net.config.grid_size, checkpoint.resize)
    if new_head:  # with the norm before it, unless the file has that one
        random = {k: v for k, v in net.state_dict().items() if k.startswith(("head.", "fc_norm."))}
        found = {k: v for k, v in weights.items() if not k.startswith(("head.", "norm."))}
        weights = random | found
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:  # it names keys and shapes
        reason = " ".join(str(error).split())
        raise ValueError(f"{checkpoint.source} is no ViT we know. {reason[:400]}") from None
    return net


def build(config: vit.Config, drop_path: float = 0.0) -> vit.ViT:
    """A random ViT, plain or of a family."""
    size, patch = config.image_size, config.patch
    if size % patch:
        raise ValueError(
            f"--image-size {size} does not divide into patches of {patch} pixels: try --image-size "
            f"{max(1, round(size / patch)) * patch}"
        )
    if config.dim % config.heads:
        raise ValueError(f"a width of {config.dim} does not divide into {config.heads} heads")
    if type(config) is vit.Config:
        return vit.ViT(config, drop_path)
    from teachers.vit import ViT

    return ViT(config, drop_path)


def to_config(architecture: dict[str, Any]) -> vit.Config:
    """The Config of a plain ViT, unless a field of a family differs from its default."""
    plain = {f.name: architecture[f.name] for f in fields(vit.Config) if f.name in architecture}
    if architecture.keys() == plain.keys():
        return vit.Config(**plain)
    from teachers.vit import Config

    config = Config(**architecture)
    return vit.Config(**plain) if config == Config(**plain) else config


def make_config(settings, dataset, **changes) -> vit.Config:
    """The ViT that --model and --patch ask for, for these images and classes."""
    if settings.model in vit.SIZES:
        found = dict(zip(("dim", "depth", "heads"), vit.SIZES[settings.model], strict=True))
    else:  # with components
        from teachers.vit import parse_model

        found = parse_model(settings.model)
    images = dict(image_size=dataset.image_size, channels=dataset.channels, patch=settings.patch)
    return to_config(found | images | {"classes": len(dataset.classes)} | changes)


def new_vit(settings, dataset, **changes) -> vit.ViT:
    """A random one, on the CPU. The caller seeds."""
    return build(make_config(settings, dataset, **changes), settings.drop_path)


@dataclass
class Model:
    """A trained ViT of any method. A student of attention copy brings its teacher."""

    net: vit.ViT
    checkpoint: Checkpoint | None = None
    teacher: Any = None  # a ViT or an adapt.TeacherAdapter
    layers: Sequence[int] = ()

    def __call__(self, images: Tensor) -> Tensor:  # logits (B, classes)
        return self.net(images, self.borrow(images))

    def blockwise(self, images: Tensor) -> Iterator:
        return self.net.blockwise(images, self.borrow(images))

    def borrow(self, images: Tensor) -> Iterator | None:
        return self.teacher.lend(images, self.layers) if self.teacher else None


def open_model(source: str | Path | Checkpoint, device="cpu", image_size=None) -> Model:
    """A checkpoint as a Model, frozen, at its own or another image size."""
    found = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    nets = [build_vit(one, image_size) for one in (found, found.teacher) if one]
    net, *teacher = (one.to(device).eval().requires_grad_(False) for one in nets)
    if not teacher:
        return Model(net, found)
    from teachers.adapt import adapt

    return Model(net, found, adapt(*teacher, net, found.layers, **found.adapted), found.layers)
