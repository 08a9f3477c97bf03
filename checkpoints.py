"""What files of weights mean: ours, MAE's or any plain ViT's, opened as a model.

model = open_model("runs/.../model.pt")         # of any method
logits = model(images)
for x, attended in model.run(images): ...       # block by block, as vit.ViT.run
"""

from launch import print0

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import conversion
import families
import storage
from attention import Attended
from lending import Lender, described, lender
from positions import PLAINLY, Resize, resized, resized_relative
from settings import IMAGES, RUN, Settings, check
from vit import Config, ViT


@dataclass(frozen=True)
class Checkpoint:
    """What a file says of a ViT. `architecture`: the fields of vit.Config."""

    source: str
    weights: dict[str, Tensor]
    architecture: dict
    classes: list[str] | None = None
    normalization: tuple[list[float], list[float]] | None = None
    method: str = "?"
    teacher: "Checkpoint | None" = None  # of a student of attention copy: whose maps it uses,
    layers: tuple[int, ...] = ()  # in which blocks,
    lent: tuple[tuple[int, ...], str] = ((), "")  # of which of the teacher's, and which heads
    settings: dict = field(default_factory=dict)  # of the run that made it, where the file says it
    resize: Resize = PLAINLY  # how positions are made those of another image size

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights, whatever file they are in."""
        return fingerprint(self.weights)

    def images(self, asked: Settings) -> Settings:
        """`asked`, with the images that this was trained on where no others are asked for."""
        own, name = self.settings, asked.data or self.settings.get("data")
        if not name:
            raise ValueError(f"{self.source} does not say which images it is for: name --data")
        which = {"data": name, "image_size": self.architecture["image_size"], "holdout": 0}
        if asked.scraps < 0:
            which["scraps"] = own.get("scraps", IMAGES["scraps"].default)
        if name == own.get("data"):
            folder = own.get("data_dir") or f"data/{name}"
            if not asked.data_dir or Path(asked.data_dir).resolve() == Path(folder).resolve():
                which |= {k: own[k] for k in ("data_dir", "holdout") if k in own}
                skipped = own.get("skip_unreadable", False)
                which["skip_unreadable"] = asked.skip_unreadable or skipped
        return asked.but(**which)

    def __str__(self) -> str:
        epochs = self.settings.get("epochs")
        made = "" if self.method == "?" else f"{self.method}, "
        made += f"{epochs} epochs, " if epochs else ""
        return f"{self.source} ({made}weights {self.fingerprint})"


def fingerprint(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


@dataclass
class Model:
    """A trained ViT of any method, ready to evaluate: one of attention copy brings its teacher."""

    net: ViT
    checkpoint: Checkpoint | None = None
    teacher: ViT | Lender | None = None
    layers: tuple[int, ...] = ()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.net(images, self.given(images))

    def run(self, images: Tensor) -> Iterator[tuple[Tensor, Attended]]:
        """Block by block: the tokens (B, N, D) that it made, and what it attended with."""
        return self.net.run(images, self.given(images))

    def given(self, images: Tensor):
        return self.teacher.queries_keys(images, self.layers) if self.teacher else ()


def open_model(source: str | Path, device="cpu", heads: int = 0) -> Model:
    """The model that a name, file or URL holds, of any method. Errors as those of `read`."""
    return opened(read(source, heads), device)


def opened(checkpoint: Checkpoint, device="cpu", image_size: int | None = None) -> Model:
    """The model of a checkpoint; for another image size if asked."""
    net = load(checkpoint, image_size=image_size).to(device).eval().requires_grad_(False)
    if not checkpoint.teacher:
        return Model(net, checkpoint)
    teacher = load(checkpoint.teacher, image_size=image_size)
    teacher = teacher.to(device).eval().requires_grad_(False)
    try:
        whose = lender(teacher, net, checkpoint.layers, *checkpoint.lent)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint.source} holds a student and a teacher of another kind ({error})"
        ) from None
    return Model(net, checkpoint, whose, checkpoint.layers)


# Reading ------------------------------------------------------------------------------------------


def read(source: str | Path, heads: int = 0) -> Checkpoint:
    """A checkpoint by name (see families.locate), path or URL: ours, or a ViT's of any family.

    `heads`: the number of attention heads, for a file that does not say it. Nothing in the file is
    executed; what its licence forbids is printed. ValueError if it is not a checkpoint of a ViT,
    FileNotFoundError if it is not there.
    """
    source = str(source)
    member, place = families.locate(source)
    for note in families.notes(member):
        print0(f"note: {note}")
    found = storage.read(place)
    try:
        return understand(found, source, heads, member)
    except Exception as error:  # whatever a file of something else leads to
        reason = str(error)
        if source not in reason:
            reason = f"{type(error).__name__}: {reason}"
            reason = f"{source} holds no ViT that can be understood ({reason})"
        if storage.is_url(place):
            reason += f" (it is kept as {storage.kept_at(place)}: remove that to fetch it anew)"
        raise ValueError(reason) from error


def understand(
    found: object, source: str, heads: int = 0, member: families.Member | None = None
) -> Checkpoint:
    """What was found in a file, as a Checkpoint."""
    about = found if isinstance(found, dict) else {}
    if "optimizer" in about and "run" in about:
        raise ValueError(f"{source} is the state of a run, to resume it: name its model.pt")
    wrappers = ("model", "state_dict", "module", "teacher")
    weights = next((about[key] for key in wrappers if isinstance(about.get(key), dict)), about)
    if not any(str(name).endswith(conversion.PATCHES) for name in weights):
        raise ValueError(f"{source} holds no ViT: it embeds no patches")
    names = ("classes", "normalization", "method", "settings")
    known = {k: about[k] for k in names if about.get(k) is not None}
    architecture = ours = about.get("architecture")
    if ours:  # whatever it is called
        member = None
        weights = {k: v for k, v in weights.items() if not conversion.DROPPED.match(str(k))}
    else:
        weights = conversion.ours(weights)
        try:
            architecture = asdict(conversion.describe(weights, member, heads))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    for name, value in weights.items():
        if wrong := what_is_wrong(name, value):
            raise ValueError(f"{source} holds no ViT that can be used: {name} {wrong}")
    if member:
        known |= {"normalization": member.family.normalization, "method": member.family.title}
    check_facts(source, architecture, **known)
    if member:
        known["resize"] = member.family.resize
    if "normalization" in known:  # a tuple of lists, as ours are: to compare
        known["normalization"] = tuple([float(x) for x in xs] for xs in known["normalization"])
    if ours and about.get("teacher"):
        known["teacher"] = understand(about["teacher"], source)
        known["layers"] = layers = tuple(about["layers"])
        theirs, lent_heads = about.get("lent") or ((), "")
        known["lent"] = tuple(theirs), str(lent_heads)
        lends = known["teacher"].architecture
        for which, net in ((layers, architecture), (theirs or layers, lends)):
            if not which or not all(i in range(net["depth"]) for i in which):
                raise ValueError(f"{source} copies layers {tuple(which)} of {net['depth']}")
    return Checkpoint(source, weights, architecture, **known)


def what_is_wrong(name: object, value: object) -> str:
    """Why something cannot be a weight; nothing if it can."""
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return "is no tensor with a name"
    if value.layout is not torch.strided or value.is_meta or not value.is_floating_point():
        return f"is not made of ordinary numbers ({value.dtype}, {value.layout}, {value.device})"
    return "" if value.isfinite().all() else "is not finite: its training diverged"


def check_facts(
    source: str, architecture: dict, classes=None, normalization=None, method="", settings=None
) -> None:
    """ValueError if what a file says beside its weights cannot be."""
    try:
        Config(**architecture).check()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} describes no ViT that could be built ({error})") from None
    if classes is not None:
        named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        named = named and len(set(classes)) == len(classes)
        outputs = architecture["classes"]
        if not named or (outputs and len(classes) != outputs):
            raise ValueError(f"{source} has {outputs} outputs, but names other classes")
    if normalization is not None:
        mean, deviation = torch.tensor(normalization, dtype=torch.float32)
        scale = 1 / deviation
        channels = len(mean) == len(deviation) == architecture["channels"]
        if not channels or not (mean.isfinite() & scale.isfinite() & (scale > 0)).all():
            raise ValueError(f"{source} has no normalisation that could be used: {normalization}")
    if not isinstance(method, str) or type(settings) not in (dict, type(None)):
        raise ValueError(f"{source} does not say how it was made in words ({method}, {settings})")
    for name, row in (IMAGES | {"amp": RUN["amp"]}).items():
        if name in (settings or {}):
            kind = type(row.of(0))
            if type(settings[name]) not in ((int, float) if kind is float else (kind,)):
                raise ValueError(f"{source} was made with an odd {name}: {settings[name]!r}")
            check(name, settings[name], row)


def load(
    checkpoint: Checkpoint,
    *,
    image_size: int | None = None,
    classes: int | None = None,
    drop_path: float = 0.0,
) -> ViT:
    """The ViT of a checkpoint, at its own or another image size (positions are interpolated).

    With `classes`, the head is made anew for that number (0: no head); without, the file's own head
    must fit. What does not fit is refused with a ValueError that names the keys and shapes.
    """
    arch, weights = checkpoint.architecture, dict(checkpoint.weights)
    new_head = classes is not None or not arch["classes"]
    if new_head:
        weights = {k: v for k, v in weights.items() if not k.startswith("head.")}
    shape = {"image_size": image_size or arch["image_size"]}
    shape["classes"] = arch["classes"] if classes is None else classes
    try:
        vit = ViT(Config(**arch | shape), drop_path)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{checkpoint.source} can be no ViT for these images of {shape['image_size']} pixels "
            f"({error}): change --data, --image-size or the file"
        ) from error
    own, side = vit.state_dict(), vit.config.side
    try:
        if "pos_embed" in weights:
            weights["pos_embed"] = resized(weights["pos_embed"], side, checkpoint.resize)
        for name in [name for name in weights if name.endswith("relative.table")]:
            weights[name] = resized_relative(weights[name], side)
    except Exception as error:  # of tensors of any shape
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise ValueError(
            f"{checkpoint.source} has positions that form no grid ({reason})"
        ) from error
    fresh = [k for k in own if new_head and k.startswith(("head.", "fc_norm."))]
    differ = [f"{k} is missing" for k in own if k not in weights and k not in fresh]
    differ += [f"{k} is not ours" for k in weights if k not in own]
    for k in own.keys() & weights.keys():
        if weights[k].shape != own[k].shape:
            differ.append(f"{k} is {tuple(weights[k].shape)}, not {tuple(own[k].shape)}")
    if differ:
        more = f", and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise ValueError(
            f"{checkpoint.source} is no ViT that we know: " + "; ".join(differ[:4]) + more
        )
    vit.load_state_dict(weights, strict=False)
    return vit


def export(net: ViT, teacher: ViT | Lender | None = None, layers: Sequence[int] = ()) -> dict:
    """What model.pt holds of a ViT. (train.fit adds what it was trained on, and how.)

    `teacher`: of a student of attention copy, which needs it, in `layers`.
    """
    found = {"model": net.state_dict(), "architecture": asdict(net.config)}
    if teacher:
        theirs, lent = described(teacher)
        found |= {"teacher": export(theirs), "layers": layers, "lent": lent}
    return found
