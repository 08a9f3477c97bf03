"""What can be set: one row per setting, and the one place where a command line becomes settings.

A script's table is the common rows below, changed where the method differs, and rows of its own:

    SETTINGS = change(COMMON, lr=(8e-3, 1e-3, 8e-4)) | {"mask_ratio": Setting(0.75, "share ...")}
    parse = functools.partial(parse_settings, __doc__, SETTINGS)
    parse(["--lr", "0.1"]).lr                       # 0.1, with all else as the table has it
"""

import argparse
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import data
import vit


class Setting(NamedTuple):
    """A row. The type of a setting is that of its (first) default."""

    default: Any  # one for all data sets, or three: for the digits, CIFAR, and ImageNet or a folder
    help: str
    low: float = 0
    high: float = math.inf
    choices: Collection[str] = ()
    free: bool = False  # may change between a run and its resumption

    def of(self, recipe: int) -> Any:
        """The default for one of the three recipes (see data.Kind)."""
        return self.default[recipe] if isinstance(self.default, tuple) else self.default


Table = dict[str, Setting]

IMAGES: Table = {
    "data": Setting("digits", "the data set", choices=data.KINDS),
    "data_dir": Setting("data", "where the images are, or go", free=True),
    "image_size": Setting(0, "side of the images in pixels (0: the data set's own)"),
    "num_labels": Setting((100, 0, 0), "use so many training images, class by class (0: all)"),
    "subset_seed": Setting(-1, "draws these images (-1: --seed does)", low=-1),
    "holdout": Setting(0, "validate on so many training images, held out, not on the test images"),
    "scraps": Setting(
        2, "number of scraps of other digits on the canvas of --data digits", high=20
    ),
    "workers": Setting(
        8, "processes that decode images, per GPU (at most one per core)", free=True
    ),
    "memory": Setting(2.0, "hold a folder in memory if it has at most so many GB when decoded"),
    "skip_unreadable": Setting(False, "skip images that cannot be read, and count them"),
}
MODEL: Table = {
    "model": Setting(("micro", "tiny", "large"), "size of the ViT", choices=vit.SIZES),
    "patch": Setting((3, 4, 16), "side of a patch in pixels", low=1),
    "drop_path": Setting(
        (0.0, 0.1, 0.2), "probability of dropping a branch, in the last block", high=0.99
    ),
}
TRAINING: Table = {  # as training from scratch has them; the methods change some
    # name                   digits cifar imagenet
    "epochs":       Setting((450,   100,   200), "passes over the training images", low=1),
    "warmup":       Setting((45,    5,     20), "epochs of linear warm-up (follows --epochs)"),
    "batch":        Setting((50,    512,   2048), "images per step, over all GPUs", low=1),
    "lr":           Setting((4e-3,  1e-3,  8e-4), "peak learning rate, at this batch"),
    "min_lr":       Setting((0.0,   1e-6,  1e-6), "learning rate at the end of the cosine"),
    "weight_decay": Setting((0.05,  0.05,  0.3), "AdamW's, of matrices only"),
    "beta2":        Setting((0.999, 0.999, 0.95), "AdamW's second beta (first: 0.9)", high=0.9999),
    "layer_decay":  Setting(1.0, "factor on the rate per layer below the head", low=0.01, high=1),
    "clip":         Setting((1.0,   1.0,   0.0), "largest gradient norm (0: no limit)"),
    "ema":          Setting((0.0,   0.999, 0.9999), "average's decay (0: none)", high=0.999999),
    "eval_every":   Setting((45,    1,     1), "epochs between validations", low=1),
}  # fmt: skip
AUGMENTATION: Table = {
    # name                   digits cifar imagenet
    "crop_area":    Setting((0.0,   0.0,   0.08), "least share a crop keeps (0: shifts)", high=1),
    "randaugment":  Setting((0,     0,     9), "magnitude of RandAugment (0: none)", high=30),
    "random_erase": Setting((0.0,   0.25,  0.25), "probability of random erasing", high=1),
    "mixup":        Setting((0.0,   0.8,   0.8), "alpha of MixUp (0: none)"),
    "cutmix":       Setting((0.0,   1.0,   1.0), "alpha of CutMix (0: none)"),
    "smoothing":    Setting((0.0,   0.1,   0.1), "label smoothing", high=0.99),
}  # fmt: skip
RUN: Table = {
    "seed": Setting(0, "the run is a function of it", high=2**63 - 1),
    "out": Setting("", "folder of the run (empty: runs/METHOD-DATA-MODEL-sSEED)", free=True),
    "resume": Setting(False, "go on from --out/last.pt if it is there", free=True),
    "overwrite": Setting(False, "start over although --out holds a run", free=True),
    "save_every": Setting(600, "seconds between checkpoints within an epoch", free=True),
    "device": Setting("auto", "cpu, cuda, mps, or auto: what there is", free=True),
    "amp": Setting(
        "auto",
        "mixed precision; auto: bf16 if the hardware has it, else fp16 on GPUs; not for tiny nets",
        choices=("auto", "off", "bf16", "fp16"),
    ),
    "micro_batch": Setting(
        0, "images at a time per GPU; gradients add up to --batch (0: all at once)", free=True
    ),
    "compile": Setting(
        "auto",
        "torch.compile the step; graphs: CUDA graphs too; auto: on for long runs on CUDA",
        choices=("auto", "off", "on", "graphs"),
        free=True,
    ),
}
TEACHER: Table = {
    "teacher": Setting(
        "auto",
        "auto (pre-trained here if need be), mae (published weights), random, none, "
        "or a checkpoint's path or URL",
    ),
    "teacher_heads": Setting(0, "attention heads of a --teacher whose file does not say how many"),
}
TRANSFER: Table = {
    "layers": Setting(
        ("3", "all", "all"),
        "whose maps are transferred: a count (18), range (6-11), list (0,2,4-7) or all",
    ),
    "share_drops": Setting(True, "drop path drops the same branches in teacher and student"),
}
HEADS: Table = {  # of scripts that open checkpoints
    "heads": Setting(0, "attention heads, for files of others that do not say how many"),
}
GROUPS = {
    "images": IMAGES,
    "model": MODEL,
    "training": TRAINING,
    "augmentation": AUGMENTATION,
    "run": RUN,
    "teacher": TEACHER | TRANSFER,
}
OWN = "this script"  # the group of what stands in no common table
COMMON = IMAGES | MODEL | TRAINING | AUGMENTATION | RUN
FREE = {name for table in GROUPS.values() for name, row in table.items() if row.free}


def change(table: Table, **defaults) -> Table:
    """The table with other defaults."""
    return table | {name: table[name]._replace(default=value) for name, value in defaults.items()}


def pick(*names: str) -> Table:
    """These of the common rows."""
    return {name: COMMON[name] for name in names}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def to_argv(values: dict[str, Any]) -> list[str]:
    """The words of a command line that give these settings."""
    return [word for name, value in values.items() for word in (flag(name), str(value))]


class Settings:
    """What a run was asked for, as attributes. They do not change: `but` makes others."""

    def __init__(self, **values):
        self.__dict__.update(values)

    def __setattr__(self, name: str, value):
        raise AttributeError(f"settings are frozen: settings.but({name}=...) makes others")

    def __repr__(self) -> str:
        return "Settings(" + ", ".join(f"{k}={v!r}" for k, v in vars(self).items()) + ")"

    def but(self, **changes) -> "Settings":
        return Settings(**vars(self) | changes)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def parse_settings(
    doc: str,
    table: Table,
    argv: Sequence[str],
    *,
    variants: dict[tuple[str, str], Table] | None = None,
    positional: tuple[str, str] | None = None,
) -> Settings:
    """The settings of a command line: what it gives, else the table's defaults for its data set.

    `variants`: the table to use instead where a setting has some value. `positional`: name and help
    of words that belong to no flag. Raises ValueError, in words that name the flag, for what is
    unknown or out of bounds.
    """
    given = vars(parser(doc, table, positional).parse_args(argv))
    for (name, value), other in (variants or {}).items():
        if given.get(name, table[name].of(0)) == value:
            table = other
    for name, row in table.items():
        if name in given:
            check(name, given[name], row)
    images = given.get("data", table["data"].of(0) if "data" in table else "digits")
    recipe = data.KINDS[images].recipe
    values = {name: row.of(recipe) for name, row in table.items()}
    if "epochs" in given and "warmup" in values:
        values["warmup"] = values["warmup"] * given["epochs"] // values["epochs"]
    return Settings(**values | given)


def parser(doc: str, table: Table, positional: tuple[str, str] | None = None) -> Parser:
    words = f" {positional[0].upper()} ..." if positional else ""
    made = Parser(
        description=doc,
        usage=f"%(prog)s{words} [--NAME VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    if positional:
        made.add_argument(positional[0], nargs="+", help=positional[1])
    titles = {name: group_of(name) for name in table}
    groups = {
        title: made.add_argument_group(title)
        for title in (OWN, *GROUPS)
        if title in titles.values()
    }
    for name, row in table.items():
        kind = type(row.of(0))
        how = {"type": kind, "metavar": "X"}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        groups[titles[name]].add_argument(flag(name), help=described(row), **how)
    return made


def group_of(name: str) -> str:
    return next((title for title, rows in GROUPS.items() if name in rows), OWN)


def described(row: Setting) -> str:
    """The help of a setting: what it is, what may be chosen, the default (of each data set)."""
    choices = f" ({', '.join(filter(None, row.choices))})" if row.choices else ""
    default = row.default
    if isinstance(default, tuple):
        digits, cifar, imagenet = default
        default = f"digits {digits}, cifar {cifar}, imagenet {imagenet}"
    return f"{row.help}{choices} [{default}]"


def check(name: str, value: Any, row: Setting) -> None:
    """ValueError unless a value is within the bounds of its row."""
    asked = f"{flag(name)} {value}"
    if row.choices and value not in row.choices:
        raise ValueError(f"{asked}: choose one of {', '.join(filter(None, row.choices))}")
    if not isinstance(value, int | float):
        return
    if not value < 2**63:  # nor is nan
        raise ValueError(f"{asked}: must be a finite number")
    if not row.low <= value <= row.high:
        bounds = f"between {row.low} and {row.high}"
        if row.high == math.inf:
            bounds = f"at least {row.low}"
        raise ValueError(f"{asked}: must be {bounds}")
