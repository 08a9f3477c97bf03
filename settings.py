"""What can be set: one row per setting, and the one place where a command line becomes settings.

A script's table is the common rows below, changed where the method differs, and rows of its own:

    SETTINGS = change(COMMON, lr=(8e-3, 1e-3, 8e-4)) | {"mask_ratio": Setting(0.75, "share ...")}
    parse = functools.partial(parse_settings, __doc__, SETTINGS)
    parse(["--lr", "0.1"]).lr                       # 0.1, with all else as the table has it
"""

import argparse
import math
import sys
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import data
import families
import vit


class Setting(NamedTuple):
    """A row. The type of a setting is that of its (first) default."""

    default: Any  # one for all data sets, or one for each of RECIPES
    help: str
    low: float = 0
    high: float = math.inf
    choices: Collection[str] = ()
    free: bool = False  # may change between a run and its resumption

    def of(self, recipe: int) -> Any:
        """The default for one of RECIPES (see data.Kind). A folder's is CIFAR's if not given."""
        if not isinstance(self.default, tuple):
            return self.default
        return self.default[recipe if recipe < len(self.default) else RECIPES.index("cifar")]


RECIPES = ("digits", "cifar", "imagenet", "folder")
Table = dict[str, Setting]

IMAGES: Table = {
    "data": Setting("digits", "the data set", choices=data.KINDS),
    "data_dir": Setting("", "where the images are, or go (empty: data/DATA)", free=True),
    "image_size": Setting(0, "side of the images in pixels (0: the data set's own)", high=4096),
    "num_labels": Setting(
        (100, 0, 0), "labelled images to train on, as many of each class (0: all)"
    ),
    "subset_seed": Setting(-1, "draws the --num-labels images (-1: --seed does)", low=-1),
    "holdout": Setting(
        -1,
        "training images to hold out and validate on, instead of on the test images "
        "(-1: a fifth of a folder that has no val/, else none)",
        low=-1,
    ),
    "scraps": Setting(
        1, "number of scraps of other digits on the canvas of --data digits", high=20
    ),
    "workers": Setting(
        8, "processes that decode images, per GPU (at most one per core)", free=True
    ),
    "memory": Setting(
        2.0,
        "GB for the decoded images of a folder: if they fit, they are decoded once",
        free=True,
    ),
    "skip_unreadable": Setting(False, "try all images first, and leave out what cannot be read"),
}
MODEL: Table = {
    "model": Setting(
        ("micro", "tiny", "large", "mini"),
        f"size of the ViT ({', '.join(vit.SIZES)}), or of a teacher by its name; with --teacher "
        "NAME it is the teacher's",
    ),
    "patch": Setting((3, 4, 16, 16), "side of a patch in pixels", low=1),
    "components": Setting(
        "", "what it has beyond a plain ViT, such as registers=4,layer_scale=1e-5"
    ),
    "drop_path": Setting(
        (0.0, 0.1, 0.2), "probability of dropping a branch, in the last block", high=0.99
    ),
}
TRAINING: Table = {  # as training from scratch has them; the methods change some
    # name                   digits cifar imagenet folder
    "epochs":       Setting((450,   100,   200), "passes over the training images", 1, 10**7),
    "warmup":       Setting((45,    5,     20), "epochs of linear warm-up (follows --epochs)"),
    "batch":        Setting((50,    512,   2048,  0), "images per step, over all GPUs (0: 1/8 of "
                            "the images, at most 64)"),
    "lr":           Setting((2e-3,  1e-3,  8e-4), "peak learning rate, at --lr-batch"),
    "lr_batch":     Setting((50,    512,   2048,  64), "the batch that the rate is for: with "
                            "another it is scaled (0, also if --lr is given: it is not)"),
    "min_lr":       Setting((0.0,   1e-6,  1e-6), "rate at the end of the cosine, at --lr-batch"),
    "weight_decay": Setting((1.5,   0.05,  0.3), "AdamW's, of matrices only"),
    "beta2":        Setting((0.999, 0.999, 0.95), "AdamW's second beta (first: 0.9)", high=0.9999),
    "layer_decay":  Setting(1.0, "factor on the rate per layer below the head", low=0.01, high=1),
    "clip":         Setting((1.0,   1.0,   0.0), "largest gradient norm (0: no limit)"),
    "ema":          Setting((0.0,   0.999, 0.9999), "decay of the average of the weights "
                            "(0: no average)", 0, 0.999999),
    "eval_every":   Setting((45,    1,     1,     5), "epochs between validations", low=1),
}  # fmt: skip
AUGMENTATION: Table = {
    # name                   digits cifar imagenet folder
    "crop_area":    Setting((0.0,   0.0,   0.08,  0.3), "least share of an image that a crop "
                            "keeps (0: shifts)", 0, 1),
    "randaugment":  Setting((0,     0,     9), "magnitude of RandAugment, as timm counts it "
                            "(0: none)", high=10),
    "random_erase": Setting((0.0,   0.25,  0.25), "probability of random erasing", high=1),
    "mixup":        Setting((0.0,   0.8,   0.8), "alpha of MixUp (0: none)"),
    "cutmix":       Setting((0.0,   1.0,   1.0), "alpha of CutMix (0: none)"),
    "smoothing":    Setting((0.0,   0.1,   0.1), "label smoothing", high=0.99),
}  # fmt: skip
AMP = ("auto", "off", "bf16", "fp16")
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
        choices=AMP,
    ),
    "micro_batch": Setting(
        0,
        "images at a time per GPU; gradients add up to --batch (0: as many as fit in its memory)",
        free=True,
    ),
    "compile": Setting(
        "auto",
        "torch.compile the step; graphs: CUDA graphs too; auto: on for long runs on CUDA",
        choices=("auto", "off", "on", "graphs"),
        free=True,
    ),
}
TEACHERS = (
    "auto (one that comes with this, or mae for imagenet, else pretrain), pretrain (here, on these "
    "images), mae (published weights), NAME (of those that python teachers.py lists), NAME=FILE, "
)
TEACHER: Table = {
    # Free, since it is compared by its weights.
    "teacher": Setting("auto", TEACHERS + "random, or a checkpoint's path or URL", free=True),
    "teacher_heads": Setting(0, "attention heads of a --teacher whose file does not say how many"),
}
TRANSFER: Table = {
    "layers": Setting(
        "all",
        "whose maps are transferred: a count (18) or share (75%) of the first, a range (6-11), a "
        "list (0,2,4-7) or all",
    ),
    "teacher_layers": Setting(
        "",
        "whose maps --layers take, one each, as --layers are written (empty: of the same number)",
    ),
    "heads": Setting(
        "",
        "which of the teacher's, written as --layers are (empty: all); together: one map for all",
    ),
    "student": Setting(
        "",
        "plain: without the components of its teacher, the control (empty: with them, at random)",
        choices=("", "plain"),
    ),
    "share_drops": Setting(True, "drop path drops the same branches in teacher and student"),
}
OPENING: Table = {  # of scripts that open checkpoints, which say what they were trained on
    "data": Setting("", "the data set (empty: the checkpoint's)", choices=("", *data.KINDS)),
    "data_dir": Setting("", "where the images are (empty: where they were, or data/DATA)"),
    "scraps": Setting(-1, "scraps on the canvas of --data digits (-1: as in training)", -1, 20),
    **{name: IMAGES[name] for name in ("workers", "memory", "skip_unreadable")},
    "device": RUN["device"],
    "num_heads": Setting(0, "attention heads, for files of others that do not say how many"),
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
    """The table with other defaults. --lr-batch follows --batch; a folder's stays if not given."""
    if "batch" in defaults:
        defaults["lr_batch"] = defaults["batch"]
    return table | {name: changed(table[name], value) for name, value in defaults.items()}


def changed(row: Setting, default: Any) -> Setting:
    if isinstance(default, tuple) and isinstance(row.default, tuple):
        default += row.default[len(default) :]
    return row._replace(default=default)


def pick(*names: str) -> Table:
    """These of the common rows."""
    return {name: COMMON[name] for name in names}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def to_argv(values: dict[str, Any]) -> list[str]:
    """The words of a command line that give these settings."""
    words = []
    for name, value in values.items():
        yes_or_no = flag(name) if value is True else flag(f"no_{name}")
        words += [yes_or_no] if isinstance(value, bool) else [flag(name), str(value)]
    return words


class Settings(SimpleNamespace):
    """What a run was asked for, as attributes. They do not change: `but` makes others."""

    def __setattr__(self, name: str, value):
        raise AttributeError(f"settings are frozen: settings.but({name}=...) makes others")

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
    given = vars(parser(doc, positional, table).parse_intermixed_args(argv))
    help_asked = given.pop("help", False)
    for (name, value), other in (variants or {}).items():
        if given.get(name, table[name].of(0)) == value:
            table = other
    for name, row in table.items():
        if name in given:
            check(name, given[name], row)
    images = given.get("data", table["data"].of(0) if "data" in table else "")
    recipe = data.KINDS[images].recipe if images else 0
    if help_asked:
        print(parser(doc, positional, table, recipe).format_help(), end="")
        sys.exit(0)
    if positional and not given.get(positional[0]):
        raise ValueError(f"name {positional[1]} (--help shows how)")
    values = {name: row.of(recipe) for name, row in table.items()}
    if "epochs" in given and "warmup" in values:
        values["warmup"] = values["warmup"] * given["epochs"] / values["epochs"]
    if "lr" in given:
        values["lr_batch"] = 0
    member, _ = families.locate(given.get("teacher", ""))
    if member and "model" in values:
        values |= {"model": member.name, "patch": member.patch}
    made = Settings(**values | given)
    if "warmup" in values and made.warmup >= made.epochs:
        raise ValueError(f"--warmup {made.warmup}: must be less than --epochs {made.epochs}")
    return made


def parser(doc: str, positional: tuple[str, str] | None, table: Table, recipe: int = 0) -> Parser:
    """argparse's, whose help shows the defaults of one recipe."""
    words = f" {positional[0].upper()} ..." if positional else ""
    others = ", ".join(name for name, kind in data.KINDS.items() if kind.recipe != recipe)
    which = f"[Defaults] are those of {RECIPES[recipe]}. Others:\n--help --data NAME ({others})"
    several = any(isinstance(row.default, tuple) for row in table.values())
    made = Parser(
        description=doc,
        usage=f"%(prog)s{words} [--NAME VALUE ...]",
        epilog=which if several else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    made.add_argument("--help", "-h", action="store_true", help=argparse.SUPPRESS)
    if positional:
        made.add_argument(positional[0], nargs="*", help=positional[1])
    groups = {title: made.add_argument_group(title) for title in (OWN, *GROUPS)}  # empty: not shown
    for name, row in table.items():
        title = next((title for title, rows in GROUPS.items() if name in rows), OWN)
        kind = type(row.of(0))
        how = {"type": kind, "metavar": "X"}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        groups[title].add_argument(flag(name), help=described(row, recipe), **how)
    return made


def described(row: Setting, recipe: int) -> str:
    """The help of a setting: what it is, what may be chosen, bounds, the default."""
    choices = f" ({', '.join(filter(None, row.choices))})" if row.choices else ""
    return f"{row.help}{choices} [{row.of(recipe)}]".replace("%", "%%").replace(" []", "")


def check(name: str, value: Any, row: Setting) -> None:
    """ValueError unless a value is within the bounds of its row."""
    asked = f"{flag(name)} {value}"
    if row.choices and value not in row.choices:
        raise ValueError(f"{asked}: choose one of {', '.join(filter(None, row.choices))}")
    if not isinstance(value, int | float):
        return
    if not value < 2**63:  # nor is nan
        raise ValueError(f"{asked}: must be a finite number, below 2^63")
    if not row.low <= value <= row.high:
        bounds = f"between {row.low} and {row.high}"
        if row.high == math.inf:
            bounds = f"at least {row.low}"
        raise ValueError(f"{asked}: must be {bounds}")
