"""The page that moves: four nets of the pointer scenes, which run in the reader's browser.

A row of a matrix is kept as a scale and whole numbers from -127 to 127: float16 would not fit
into 1.5 MB. Nets are rounded first and tested then, so the page's accuracies are its own.
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

import attention_copy
import attention_distill
import data
import finetune
import train
from common import checkpoints, pictures
from common.settings import parse_layers
from datasets import digits, scenes
from pretrain import patchify
from study.figures import COLOURS
from teachers.bundled import BUNDLED
from teachers.load import Model, open_model

STUDENTS = {
    "attention copy": (attention_copy,),
    "attention distillation": (attention_distill,),
    "from scratch": (finetune, "--teacher", "none"),
}
CENTRE = 5  # the token of a scene's centre cell: the class token, then nine cells
TEMPLATE = Path(__file__).with_name("explorer_template.html")
CPU = "--device", "cpu"
EACH = 12  # test digits of each class, for the reader to choose from


def draw_explorer(path: Path, *changes: str) -> None:
    """`changes`: flags for all students."""
    views = [
        data.load(finetune.parse(["--label", label, *CPU, *changes])) for label in ("class", "cell")
    ]
    dataset, asked = views
    teacher = open_model(BUNDLED / "scenes.pt")
    nets = [pack(teacher) | {"name": "teacher", "on_asked": look_at_asked(teacher, asked)}]
    nets[0]["top1"] = score(predict_cell, teacher, asked)
    with TemporaryDirectory() as folder:
        for name, (script, *argv) in STUDENTS.items():
            out = Path(folder, name)
            settings = script.parse([*argv, *CPU, *changes, "--out", str(out)])
            script.main(settings)
            student = open_model(out / "model.pt")
            student.teacher = student.teacher and teacher.net  # the rounded one
            net = pack(student) | {"name": name, "colour": COLOURS[name], "epochs": settings.epochs}
            net |= {"top1": score(Model.__call__, student, dataset)}
            nets.append(net | {"on_asked": look_at_asked(student, asked)})
            if name == "attention distillation":
                nets[-1]["taught"] = parse_layers(settings.layers, teacher.net.config.depth)
    known = {"classes": dataset.classes, "digits": pick_digits(dataset), "noise": scenes.NOISE}
    known |= {"labels": len(dataset.train), "tested": len(dataset.test)}
    known |= {"light": pictures.LIGHT, "frame": pictures.FRAME, "black": pictures.BLACK}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in known.items()]
    lines.append('"nets": [\n' + ",\n".join(json.dumps(net) for net in nets) + "\n]")
    page = TEMPLATE.read_text().replace("@DATA@", "{" + ",\n".join(lines) + "}")
    checkpoints.save(page, path)


@torch.no_grad()
def pack(model: Model) -> dict:
    """Rounds a net's matrices, in place. Returns what the page needs of the net."""
    config, layers, parts, tensors = model.net.config, list(model.layers), [], []
    for name, value in model.net.state_dict().items():
        borrows = any(name.startswith(f"blocks.{i}.attn.qkv") for i in layers)
        value = value[2 * config.dim if borrows else 0 :]  # then it has values alone
        if name.endswith("weight") and value.ndim > 1:
            scale, numbers = round_rows(value.flatten(1))
            parts += [scale, numbers.to(torch.int8)]
            tensors.append((name, *numbers.shape))
        else:
            parts.append(value)
            tensors.append((name, value.numel()))
    (mean,), (std,) = config.mean, config.std
    known = {name: getattr(config, name) for name in ("dim", "depth", "heads", "patch", "eps")}
    weights = b"".join(part.numpy().tobytes() for part in parts)
    known |= {"mean": mean, "std": std, "layers": layers, "tensors": tensors}
    return known | {"weights": base64.b64encode(weights).decode()}


def round_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a matrix (n, m), in place, to scales (n, 1) times whole numbers (n, m)."""
    scale = matrix.abs().amax(dim=1, keepdim=True).clamp(min=1e-9) / 127
    numbers = (matrix / scale).round()
    matrix.copy_(scale * numbers)
    return scale, numbers


def score(predict: Callable, model: Model, dataset: data.Data) -> float:
    """Test accuracy in per cent of what `predict(model, images)` says."""
    found = train.predict_classes(lambda _, x: predict(model, x), model.net, dataset.test, "off")
    return train.compute_top1(*found)


def predict_cell(teacher: Model, images: Tensor) -> Tensor:
    """How near the teacher's picture is to each cell but the centre, which is never asked for."""
    cells = patchify(teacher.net.normalise(images), 8)
    distances = torch.cdist(teacher(images)[:, None], cells)[:, 0]
    distances[:, CENTRE - 1] = 1e3
    return -distances


@torch.no_grad()
def look_at_asked(model: Model, dataset: data.Data) -> float:
    """How much of its attention the centre gives the cell pointed to, in layer 0, in per cent."""
    images, cells = next(dataset.test.in_order(len(dataset.test)))
    _, qk = next(iter(model.blockwise(images)))
    p = pictures.mean_look(qk.map(), 1, query=CENTRE)
    return 100 * p[torch.arange(len(p)), 1 + cells].mean().item()


def pick_digits(dataset: data.Data) -> list[tuple[str, str]]:
    """Classes and pixels of some test digits, 0 to 16 written as 0 to g."""
    images, labels = digits.read_parts("cpu")["test"]
    found = []
    for name in dataset.classes:
        for image in images[labels == int(name)][:EACH]:
            pixels = (16 * image).int().flatten().tolist()
            found.append((name, "".join("0123456789abcdefg"[value] for value in pixels)))
    return found
