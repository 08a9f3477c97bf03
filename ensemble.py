"""Evaluates checkpoints of any method, each alone and all together.

Fine-tuning and attention distillation reach the same accuracy in different
ways, and their averaged probabilities are better than either (Li et al.,
NeurIPS 2024: 85.7 and 85.7 make 86.3); experiments/README.md has the control.
One checkpoint is plain evaluation.

    python ensemble.py runs/finetune-digits-micro-s0/model.pt \\
        runs/distill-digits-micro-s0/model.pt
    python ensemble.py a.pt b.pt --real real.json \\
        --sets /imagenet-a,/imagenet-r,/imagenet-sketch,/imagenet-v2
    python ensemble.py model.pt --image photo.jpg      what it sees, and where

The images are those that the first checkpoint was trained for, unless --data
or --data-dir say others; --sets are evaluated too. If a folder has only some
of the classes of a checkpoint, probabilities are taken over these (as
ImageNet-A and -R are scored); folders 0 to 999 are ImageNet's classes in their
order (as ImageNet-V2 names them). Images lie in DIR/val/CLASS/* or DIR/CLASS/*.
"""

import launch

import json
import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import v2

import checkpoints
import data
import image_files
import pictures
import storage
from attention import attention_map
from augment import Normalise
from checkpoints import Model
from learner import autocast
from settings import AMP, OPENING, Setting, Settings, parse_settings
from train import top1

SETTINGS = OPENING | {
    "amp": Setting("", "mixed precision (empty: as in training)", choices=("", *AMP)),
    "part": Setting("test", "test (to report) or val (to choose by)", choices=("test", "val")),
    "batch": Setting(256, "images at a time", low=1),
    "sets": Setting("", "more folders of test images, with commas between them"),
    "real": Setting("", "file of ImageNet-ReaL's labels (real.json): scores by these as well"),
    "json": Setting("", "where to write the results (empty: runs/ensemble-DATA.json)"),
    "image": Setting("", "evaluate nothing: say what this image shows, and draw where they look"),
}
parse = partial(
    parse_settings, __doc__, SETTINGS, positional=("checkpoints", "one or more model.pt")
)


def evaluate(paths: list[str], settings: Settings) -> dict:
    """Top-1 in per cent of each checkpoint, and of their averaged probabilities."""
    return score(opened(paths, settings), settings)


def opened(paths: list[str], settings: Settings) -> list[Model]:
    device = launch.device(settings.device)
    return [checkpoints.open_model(path, device, settings.num_heads) for path in paths]


def score(models: list[Model], settings: Settings) -> dict:
    """As `evaluate`, of models that are open."""
    device = launch.device(settings.device)
    settings = models[0].checkpoint.images(settings)
    members, total, first = [], 0, None
    for model in models:
        p, labels, dataset = probabilities(model, settings, device)
        path, method = model.checkpoint.source, model.checkpoint.method
        if model.checkpoint.images(settings).holdout not in (0, settings.holdout):
            print(f"note: {path} held out other images: some that it is scored on it learned from")
        if first not in (None, dataset.classes):
            before = members[0]["checkpoint"]
            raise ValueError(f"{path} was evaluated on other classes than {before}")
        first, total = dataset.classes, total + p
        found = top1(p.argmax(dim=-1), labels)
        members.append({"checkpoint": path, "method": method, "top1": found})
        if settings.real:
            members[-1]["real_top1"] = real_top1(p, dataset, settings.real)
    about = {"data": settings.data, "part": settings.part, "images": len(labels)}
    about |= {"members": members, "ensemble_top1": top1(total.argmax(dim=-1), labels)}
    if settings.real:
        about["ensemble_real_top1"] = real_top1(total, dataset, settings.real)
    return about


@torch.no_grad()
def probabilities(model: Model, settings: Settings, device) -> tuple[Tensor, Tensor, data.Data]:
    """Class probabilities (images, classes) of a model, labels (images,), and the dataset."""
    dataset = dataset_for(model, settings, device)
    columns = torch.tensor(columns_of(dataset.classes, model, settings), device=device)
    parts, labels = [], []
    amp = settings.amp or model.checkpoint.settings.get("amp", "auto")
    mixed = autocast(amp, model.net)
    for batch, theirs in getattr(dataset, settings.part).in_order(settings.batch):
        with mixed:
            logits = model(batch)
        parts.append(logits.float()[:, columns].softmax(dim=-1).cpu())
        labels.append(theirs.cpu())
        if not logits.isfinite().all():
            source = model.checkpoint.source
            raise ValueError(f"{source} gives logits that are not finite: its training diverged")
    return torch.cat(parts), torch.cat(labels), dataset


def dataset_for(model: Model, settings: Settings, device) -> data.Data:
    """The test images at the size and with the normalisation that the model was trained with."""
    config, source = model.net.config, model.checkpoint.source
    if not config.classes:
        raise ValueError(
            f"{source} has no head: fine-tune it, or transfer its attention, before evaluation"
        )
    settings = settings.but(image_size=config.image_size)
    dataset = data.load(settings, device, train=False)
    if dataset.channels != config.channels:
        raise ValueError(
            f"{source} takes images of {config.channels} channels, "
            f"--data {settings.data} has {dataset.channels}"
        )
    dataset.adopt(model.checkpoint)
    return dataset


def columns_of(classes: list[str], model: Model, settings: Settings) -> list[int]:
    """Which of the model's outputs are these classes."""
    known, outputs = model.checkpoint.classes or classes, model.net.config.classes
    source, by_number = model.checkpoint.source, all(name in BY_NUMBER for name in classes)
    if by_number and outputs == 1000 and not model.checkpoint.classes:
        return [int(name) for name in classes]
    if len(known) != outputs:
        raise ValueError(
            f"{source} has {outputs} outputs, but --data {settings.data} {len(known)} classes"
        )
    strange = [name for name in classes if name not in known]
    if strange and len(known) == 1000 and by_number:
        return [sorted(range(1000), key=lambda i: known[i])[int(name)] for name in classes]
    if strange:
        few = ", ".join(strange[:3])
        raise ValueError(
            f"{source} does not know {few} of --data {settings.data} ({len(classes)} classes)"
        )
    return [known.index(name) for name in classes]


VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})")
BY_NUMBER = {str(i) for i in range(1000)}  # as ImageNet-V2 calls ImageNet's classes


def real_top1(p: Tensor, dataset: data.Data, path: str) -> float:
    """How often the likeliest class is one of those that are to be seen (Beyer et al. 2020).

    `path`: a list of lists of classes, in the order of the numbers of the validation images; those
    without any are left out. ValueError if they are not of these images.
    """
    if p.shape[1] != 1000:
        raise ValueError(f"--real {path}: these images are of {p.shape[1]} classes, not of 1000")
    order = dataset.classes  # of the columns; by WordNet id it is ImageNet's
    numbers = [int(name) for name in order] if set(order) == BY_NUMBER else range(1000)
    found = [numbers[i] for i in p.argmax(dim=-1).tolist()]
    try:
        labels = json.loads(Path(path).read_text())
        files = [VALIDATION.fullmatch(Path(name).stem) for name in dataset.test.source.names]
        seen = [labels[int(file[1]) - 1] for file in files]
        right = [best in many for best, many in zip(found, seen, strict=True) if many]
        return 100 * sum(right) / len(right)
    except (ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"--real {path}: not the labels of these images, which must be called as ImageNet's "
            f"are, ILSVRC2012_val_00000001 and so on ({type(error).__name__}: {error})"
        ) from error


# One image ----------------------------------------------------------------------------------------


@torch.no_grad()
def look(paths: list[str], settings: Settings) -> dict[str, dict[str, float]]:
    """What each model sees in --image: its likeliest classes. A picture of where it looks."""
    if not Path(settings.image).is_file():
        raise FileNotFoundError(f"no image {settings.image}")
    device, image = launch.device(settings.device), image_files.read(settings.image)
    seen = {}
    for number, path in enumerate(paths, 1):
        model = checkpoints.open_model(path, device, settings.num_heads)
        about = model.checkpoint
        kind = data.KINDS.get(settings.data or about.settings.get("data"), data.KINDS["imagenet"])
        config, normalization = model.net.config, about.normalization or kind.normalization
        square = image_files.centre_crop(config.image_size, kind.crop_pct)(image)
        if config.channels == 1:
            square = v2.functional.rgb_to_grayscale(square)
        x = Normalise(normalization, device)(square[None].to(device))
        maps = []
        for tokens, attended in model.run(x):
            maps.append(attention_map(attended))
        some = sorted({round(i * (len(maps) - 1) / 3) for i in range(4)})
        looks = {f"layer {i + 1}": pictures.mean_look(maps[i], config.prefix) for i in some}
        which = f"-{number}" if len(paths) > 1 else ""
        drawn = Path("runs") / f"{Path(settings.image).stem}-looks{which}.png"
        drawn.parent.mkdir(exist_ok=True)
        pictures.save(pictures.overlays(x, looks, normalization, config.prefix), drawn)
        print(f"{settings.image} by {path} ({about.method})")
        seen[path] = (
            likeliest(model.net.classify(tokens)[0], about.classes) if config.classes else {}
        )
        for name, percent in seen[path].items():
            print(f"{percent:7.2f} %  {name}")
        print(f"where it looks, on average over heads and patches: {drawn}")
    return seen


def likeliest(logits: Tensor, classes: list[str] | None) -> dict[str, float]:
    """The five likeliest classes, in per cent."""
    names = classes or [f"class {i}" for i in range(len(logits))]
    p, best = logits.softmax(-1).topk(min(5, len(names)))
    return {names[i]: 100 * q for i, q in zip(best.tolist(), p.tolist(), strict=True)}


def main(settings: Settings) -> dict:
    paths = settings.checkpoints
    launch.one_process()
    if settings.image:
        return look(paths, settings)
    storage.check_place(Path(settings.json or "runs/ensemble.json"), "--json", ".json")
    folders = [folder for folder in settings.sets.split(",") if folder]
    for folder in folders:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"--sets: no folder {folder}")
    models = opened(paths, settings)
    result, others = score(models, settings), {}
    for folder in folders:
        others[folder] = score(models, settings.but(data="folder", data_dir=folder, real=""))
    if others:
        compare([(result["data"], result), *others.items()])
        result["sets"] = others
    else:
        show(result)
    out = Path(settings.json or f"runs/ensemble-{result['data']}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    storage.write_text(out, json.dumps(result, indent=1) + "\n")
    print(f"wrote {out}")
    return result


def show(result: dict) -> None:
    print(f"top-1 on {result['images']:,} images of {result['data']} ({result['part']})")
    for member in result["members"]:
        print(f"{member['top1']:7.2f} %  {member['method']:<9} {member['checkpoint']}")
    if len(result["members"]) > 1:
        print(f"{result['ensemble_top1']:7.2f} %  together, probabilities averaged")
    if "ensemble_real_top1" in result:
        real = (f"{x} %" for x in scores(result, "real_top1"))
        print("by ReaL's labels, in this order: " + ", ".join(real))


def scores(result: dict, what: str = "top1") -> list[str]:
    """Of each member; and of all together, unless it is one alone."""
    members = [member[what] for member in result["members"]]
    together = [result[f"ensemble_{what}"]] if len(members) > 1 else []
    return [f"{x:.2f}" for x in members + together]


def compare(found: list[tuple[str, dict]]) -> None:
    """A column for each set of images, a line for each checkpoint."""
    columns = []
    for name, result in found:
        columns.append([Path(name).name[:12], f"{result['images']:,}", *scores(result)])
        if "ensemble_real_top1" in result:
            columns.append(["ReaL", "", *scores(result, "real_top1")])
    members = result["members"]
    heads = ["top-1, %", "images", *map(str, range(1, len(members) + 1)), "together"]
    for head, *cells in zip(heads, *columns, strict=False):  # one alone has no "together"
        print(f"{head:<9}" + "".join(f"{cell:>13}" for cell in cells))
    for number, member in enumerate(members, 1):
        print(f"{number}: {member['method']}, {member['checkpoint']}")
    for name in (name for name, _ in found if len(Path(name).name) > 12):
        print(f"{Path(name).name[:12]}: {name}")


if __name__ == "__main__":
    launch.run(main, parse)
