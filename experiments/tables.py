"""The studies, and their tables: which rows, at which points, compared with what."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from experiments import rows
from experiments.estimates import estimates, recovery, share
from experiments.jobs import Job, Made
from experiments.looks import looks
from experiments.nearest import nearest
from experiments.rows import MAIN, Flags, Study
from experiments.shift import shifted
from experiments.teams import teams
from settings import IMAGES

DROPS, DECAYS = ("drop_path", (0.0, 0.1, 0.2)), ("layer_decay", (0.75, 1.0, 0.5))
COPIED, DISTILLED = ("layers", ("all", "3", "2")), ("layers", ("3", "all", "2"))
WEIGHTS = ("attention_weight", (3.0, 1.0, 10.0))
DIGITS = Study(
    rows=rows.ROWS,
    base={"data": "digits", "num_labels": 100, "epochs": 450},
    teacher={},
    images=("data", "scraps", "components"),
    own_teachers=True,
    seeds=(100, 101),
    rates=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    decays=(0.05, 0.2, 0.5, 1.5, 5.0),
    own={
        "from scratch": DROPS,
        "attention copy": COPIED,
        "attention distillation": DISTILLED,
        "fine-tuning": DECAYS,
        "linear probe of the teacher": ("lr", (4e-3, 3.2e-2, 6.4e-2)),  # of a head alone
        "feature distillation": WEIGHTS,
        "logit distillation": WEIGHTS,
        "copy, random teacher": COPIED,
        "distillation, random teacher": DISTILLED,
        "copy, fine-tuned teacher": COPIED,
        "teacher's maps and weights": COPIED,
        "copy, mean maps": COPIED,
        "distillation, detached": DISTILLED,
    },
)
PLAIN = dict.fromkeys(("mixup", "cutmix", "random_erase", "smoothing", "ema", "drop_path"), 0.0)
CIFAR = Study(  # small enough for a CPU: shifts and flips, a tenth of the labels
    rows=rows.ROWS,
    base={"data": "cifar10", "model": "mini", "holdout": 5000, "num_labels": 5000}
    | {"epochs": 25, "batch": 100} | PLAIN,
    teacher={"epochs": 60, "batch": 512, "lr": 1.5e-3, "decoder_dim": 96, "decoder_depth": 1},
    images=("data", "model", "holdout"),
    own_teachers=False,
    seeds=(100,),
    rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    decays=(0.05, 0.3, 1.0),
    own={
        "from scratch": ("drop_path", (0.0,)),
        "attention copy": ("layers", ("all",)),
        "attention distillation": ("layers", ("5",)),
        "fine-tuning": ("layer_decay", (0.75,)),
    },
)  # fmt: skip
RECIPE = CIFAR._replace(base={"data": "cifar10"}, teacher={}, images=("data", "model"), own={})


class Table(NamedTuple):
    """Rows at points of a study."""

    about: str
    study: Study
    rows: tuple[str, ...]
    points: dict[str, Flags]
    seeds: int = 10
    first: int = 0  # of the seeds
    tunes: bool = False  # finds settings on validation images, instead of testing
    tuned_at: str = ""  # the point whose settings all points take (empty: each its own)
    against: dict[str, str] | None = None  # what a row is compared with, where not with BASELINE
    find: Callable[["Table", Made], dict] | None = None  # something else than accuracies
    contrasts: Mapping[str, Callable[..., np.ndarray]] = MappingProxyType({})  # see below


def samples(table: Table, made: Made) -> np.ndarray:
    """Of each test image the sample that it belongs to: a digit lies in four places."""
    images = len(next(iter(next(iter(made.values())).values()))[0].correct())
    return np.arange(images) % (500 if table.study.base["data"] == "digits" else images)


def accuracies(table: Table, made: Made) -> dict:
    """Of each point the estimates of its rows; then what is asked of several."""
    correct = {point: classified(table, of_rows) for point, of_rows in made.items()}
    return estimates(correct, samples(table, made), table.against, table.contrasts)


def classified(table: Table, of_rows: dict[str, list[Job]]) -> dict[str, np.ndarray]:
    """Of each row whether it classified each test image rightly, (seeds, images)."""
    correct = {row: np.stack([job.correct() for job in jobs]) for row, jobs in of_rows.items()}
    if rows.NEAREST in table.rows:
        with_labels = [job.settings() for job in of_rows["from scratch"]]
        correct[rows.NEAREST] = np.stack([nearest(settings) for settings in with_labels])
    return correct


# What the log decides by --------------------------------------------------------------------------

SCRATCH, COPY, DISTILLATION, TUNED = MAIN


def less(row: str, other: str) -> dict[str, Callable]:
    return {f"{row} − {other}": lambda of: of[row] - of[other]}


def share_of_gain(row: str, other: str) -> dict[str, Callable]:
    return {f"share of the gain of {other} that {row} has": lambda of: share(of, row, other)}


INTERACTION = {
    "what the teacher's maps give: to its weights − to random ones": (
        lambda of: of["teacher's maps and weights"] - of[TUNED] - of[COPY] + of[SCRATCH]
    )
}


def along(points: Iterable[str]) -> dict[str, Callable]:
    """How what matters changes from the first of the points to the last."""
    first, *_, last = points
    asked = {
        "fine-tuning − from scratch": lambda of: of[TUNED] - of[SCRATCH],
        "fine-tuning − copy": lambda of: of[TUNED] - of[COPY],
        "fine-tuning − distillation": lambda of: of[TUNED] - of[DISTILLATION],
        "recovery of copy": lambda of: recovery(of, COPY),
        "recovery of distillation": lambda of: recovery(of, DISTILLATION),
    }
    return {f"{what}: {first} → {last}": changed(of) for what, of in asked.items()}


def changed(of: Callable[[dict], np.ndarray]) -> Callable:
    return lambda *at: of(at[-1]) - of(at[0])


# The tables ---------------------------------------------------------------------------------------

CLUTTER = {f"{n} scrap{'s' * (n != 1)}": {"scraps": n} for n in (0, 1, 2)}
BASE = list(CLUTTER)[IMAGES["scraps"].default]  # see `simplest`
AT_BASE = {BASE: CLUTTER[BASE]}
STEPS = {50: 900, 100: 450, 300: 150, 997: 47}  # labels: epochs of about 900 steps
LABELS = {
    f"{labels} labels": CLUTTER[BASE] | {"num_labels": labels, "epochs": epochs}
    for labels, epochs in STEPS.items()
}
MOST = list(LABELS)[-1]
LENGTHS = {f"{epochs} epochs": CLUTTER[BASE] | {"epochs": epochs} for epochs in (150, 450, 1350)}
COMPONENTS = {
    name: CLUTTER[BASE] | {"components": components}
    for name, components in {
        "LayerScale": "layer_scale=1e-5",
        "registers": "registers=4",
        "relative positions": "positions=relative",
        "rope": "positions=rope",
        "a norm before": "norm_pre=1",
    }.items()
}
AT_PHOTOS = {"5,000 labels": {}}
PHOTO_LENGTHS = {"25 epochs": {}, "75 epochs": {"epochs": 75}}
PHOTO_LABELS = {  # at about 1,250 steps
    "1,000 labels": {"num_labels": 1000, "epochs": 125},
    "5,000 labels": {},
    "41,600 labels": {"num_labels": 41_600, "epochs": 3},
}
SHORT = {"5,000 labels": {"epochs": 12}}  # for tuning
at_base = partial(Table, study=DIGITS, points=AT_BASE)
photos = partial(Table, study=CIFAR, points=AT_PHOTOS)
LOOKS = "of each layer: shares of attention; divergence, nats; CKA"
looked = {"find": lambda _, made: {"points": looks(made), "measure": LOOKS}}
AXES = {"clutter": "digits-clutter", "labels": "digits-labels", "length": "digits-length"}
TABLES = {
    "digits-tuning": Table(
        "settings of the main rows for 0, 1 and 2 scraps; and which of these is the base task",
        DIGITS, (*MAIN, *rows.PROBE, rows.NEAREST), CLUTTER, tunes=True,
    ),
    "digits-clutter": Table("the main rows for 0, 1 and 2 scraps", DIGITS, tuple(MAIN), CLUTTER,
        contrasts=along(CLUTTER)),
    "digits-labels": Table(
        "the main rows for 50 to 997 labels, at equal steps", DIGITS, tuple(MAIN), LABELS,
        tuned_at=BASE, contrasts=along(LABELS),
    ),
    "digits-length": Table(
        "the main rows for 150, 450 and 1,350 epochs", DIGITS, tuple(MAIN), LENGTHS,
        tuned_at=BASE, contrasts=along(LENGTHS),
    ),
    "digits-tuning-others": at_base(
        "settings of baselines and controls", tunes=True,
        rows=(*rows.BASELINES, *rows.CONTROLS, "copy, mean maps", "distillation, detached"),
    ),
    "digits-main": at_base(
        "main rows, baselines and controls",
        rows=(*MAIN, *rows.PROBE, *rows.BASELINES, *rows.CONTROLS, rows.NEAREST),
        contrasts=INTERACTION | less("feature distillation", DISTILLATION)
        | less("copy, fine-tuned teacher", COPY) | less("copy, fine-tuned teacher", TUNED)
        | less("teacher's maps and weights", TUNED),
    ),
    "digits-maps": at_base(
        "other maps, copied and distilled: uniform to fine-tuned", rows=(*MAIN, *rows.LADDER),
        contrasts=share_of_gain("copy, mean maps", COPY) | less("copy, mean maps", COPY)
        | less("copy, impulse maps", TUNED) | share_of_gain("distillation, mean maps", DISTILLATION)
        | less("distillation, fine-tuned teacher", DISTILLATION),
    ),
    "digits-parts": at_base(
        "q, k, v or several copied", rows=(*MAIN, *rows.PARTS), seeds=5,
        contrasts=less("copy of q", COPY) | less("copy of v", COPY) | less("copy of qkv", COPY)
        | less("copy of k", "copy of q"),
    ),
    "digits-layers": at_base(
        "which layers are copied (all, if not said) or distilled (3)",
        rows=(*MAIN, *rows.LAYERS), seeds=5,
        contrasts=less("copy, layers 2-3", "copy, layers 2")
        | less("distillation, layers 2-3", "distillation, layers 2")
        | less("distillation, layers all", DISTILLATION),
    ),
    "digits-explained": at_base(
        "distillation detached; without labels, then a probe",
        rows=(*MAIN, *rows.PROBE, *rows.EXPLAINED, "copy, layers 2", "distillation, layers 2"),
        against={"distillation, detached": "attention distillation",
                 "linear probe of that": "linear probe of the teacher",
                 "linear probe of a random net": "linear probe of that"},
        contrasts=share_of_gain("distillation, detached", DISTILLATION)
        | less("distillation, detached", COPY)  # tuning gave it two layers:
        | less("distillation, detached", "copy, layers 2")
        | less("distillation, detached", "distillation, layers 2"),
    ),
    "digits-looks": at_base(
        "where rows and teachers look; how like the teacher's are maps and features",
        rows=(*MAIN, "distillation, detached"), **looked,
    ),
    "digits-ensembles": at_base(
        "pairs of nets and their controls; do they err together?", rows=(*MAIN, *rows.AGAIN),
        find=lambda table, made: {"points": teams(made, samples(table, made))},
    ),
    "digits-shift": Table(
        "noise, contrast, more clutter, at matched accuracy", DIGITS, tuple(MAIN),
        LENGTHS | {MOST: LABELS[MOST]}, tuned_at=BASE,
        find=lambda _, made: {"points": shifted(made)},
    ),
    "digits-components": Table(
        "teachers with a component, students with and without it", DIGITS,
        (*MAIN, *rows.MISMATCHED), COMPONENTS, seeds=5, tuned_at=BASE,
        against={"from scratch": "from scratch, plain", "copy, plain student": "attention copy",
                 "distillation, plain student": "attention distillation"},
    ),
    "cifar10-gate": photos(
        "settings of the two ends; go on if they differ by 6 points", points=SHORT,
        rows=("from scratch", "fine-tuning"), tunes=True,
    ),
    "cifar10-tuning": photos(
        "settings of copy and distillation", points=SHORT,
        rows=("attention copy", "attention distillation"), tunes=True,
    ),
    "cifar10-main": photos("the main rows on photographs", rows=tuple(MAIN), seeds=5),
    "cifar10-controls": photos(
        "random teachers, the mean map, another image's, the teacher's weights as well",
        rows=(*MAIN, "copy, random teacher", "distillation, random teacher", "copy, mean maps",
              "copy, other maps", "copy, impulse maps", "distillation, mean maps",
              "teacher's maps and weights"),
        against={"copy, mean maps": "attention copy", "copy, other maps": "attention copy",
                 "copy, impulse maps": "attention copy",
                 "distillation, mean maps": "attention distillation",
                 "teacher's maps and weights": "fine-tuning"}, seeds=3,
        contrasts=INTERACTION | share_of_gain("copy, mean maps", COPY)
        | share_of_gain("distillation, mean maps", DISTILLATION),
    ),
    "cifar10-looks": photos(
        "how like the teacher's are maps and features; do maps depend on the image?",
        rows=tuple(MAIN), seeds=5, **looked,
    ),
    "cifar10-length": photos(
        "the main rows, three times as long", rows=tuple(MAIN), seeds=3,
        points=PHOTO_LENGTHS, tuned_at="5,000 labels", contrasts=along(PHOTO_LENGTHS),
    ),
    "cifar10-labels": photos(
        "the main rows with 1,000 to 41,600 labels, at equal steps", rows=tuple(MAIN), seeds=1,
        points=PHOTO_LABELS, tuned_at="5,000 labels", contrasts=along(PHOTO_LABELS),
    ),
    "cifar10-recipe": Table(
        "the main rows as --data cifar10 has them: 50,000 labels, 100 epochs (takes a GPU)",
        RECIPE, tuple(MAIN), {"50,000 labels": {"model": "tiny"}}, seeds=3,
    ),
}  # fmt: skip
