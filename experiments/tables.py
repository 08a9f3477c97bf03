"""The studies, and their tables: which rows, at which points, compared with what."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import combinations

from experiments import rows
from experiments.estimates import compute_share
from experiments.looks import draw_scenes, find_looks
from experiments.readings import find_pairs
from experiments.rows import AT_BASE, BASE, CLUTTER, MAIN
from experiments.study import NEAREST, Study, Table, share_of_gain, subtract

# The studies --------------------------------------------------------------------------------------

DROPS, DECAYS = ("drop_path", (0.0, 0.1, 0.2)), ("layer_decay", (0.75, 1.0, 0.5))
COPIED, DISTILLED = ("layers", ("all", ":3", ":2")), ("layers", (":3", "all", ":2"))
WEIGHTS = ("attention_weight", (3.0, 1.0, 10.0))
ENDS = (*MAIN, "copy, mean maps")
DIGITS = Study(
    rows=rows.ROWS,
    base={"data": "digits", "num_labels": 100, "epochs": 450, "positions": "random"},
    seeds=(100, 101),
    rates=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    decays=(0.05, 0.2, 0.5, 1.5, 5.0),
    own={
        "from scratch": DROPS, "attention copy": COPIED, "attention distillation": DISTILLED,
        "fine-tuning": DECAYS, "linear probe of the teacher": ("lr", (4e-3, 3.2e-2, 6.4e-2)),
        "feature distillation": WEIGHTS, "logit distillation": WEIGHTS,
        "copy, random teacher": COPIED, "distillation, random teacher": DISTILLED,
        "copy, fine-tuned teacher": COPIED, "teacher's maps and weights": COPIED,
        "copy, mean maps": COPIED, "distillation, detached": DISTILLED,
    },
)  # fmt: skip
FAIR = DIGITS._replace(  # students start from sin-cos positions, as their teachers
    base=DIGITS.base | {"positions": "sincos"},
    rates=(2e-3, 4e-3, 8e-3, 1.6e-2),
    decays=(0.05, 0.2, 0.5, 1.5),
    own={row: DIGITS.own[row] for row in ENDS},
)
PLAIN = dict.fromkeys(("mixup", "cutmix", "random_erase", "smoothing", "ema", "drop_path"), 0.0)
CIFAR = Study(  # small enough for a CPU: shifts and flips, a tenth of the labels
    rows=rows.ROWS,
    base={"data": "cifar10", "model": "mini", "holdout": 0.1, "num_labels": 5000}
    | {"epochs": 25, "batch": 100, "positions": "random"} | PLAIN,
    teacher={"epochs": 60, "batch": 512, "lr": 1.5e-3, "decoder_dim": 96, "decoder_depth": 1},
    images=("data", "model", "holdout"),
    teacher_seed=0,
    seeds=(100,),
    rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    decays=(0.05, 0.3, 1.0),
    own={
        "from scratch": ("drop_path", (0.0,)), "attention copy": ("layers", ("all",)),
        "attention distillation": ("layers", (":5",)), "fine-tuning": ("layer_decay", (0.75,)),
    },
)  # fmt: skip
FAIR_CIFAR = CIFAR._replace(
    base=CIFAR.base | {"positions": "sincos"},
    rates=(1e-3, 2e-3, 4e-3),
    decays=(0.3,),
    own=CIFAR.own | {"copy, mean maps": ("layers", ("all",))},
)
RECIPE = CIFAR._replace(base={"data": "cifar10"}, teacher={}, images=("data", "model"), own={})

SCENES = Study(
    rows=rows.ROWS,
    base={"data": "scenes", "num_labels": 300, "epochs": 75},
    images=("data", "scene", "model"),  # whatever the dial, the teacher's pointers point anywhere
    seeds=(100, 101),
    rates=(2e-3, 4e-3, 8e-3, 1.6e-2),
    decays=(0.05, 0.5, 1.5),
    own={row: DIGITS.own[row] for row in (*ENDS, *rows.PROBE, "feature distillation")},
)
STEPS = SCENES._replace(  # tuned at both ends of an axis of training
    rates=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    mixes=({"mixup": 0.8}, {"smoothing": 0.1}, {"mixup": 0.8, "smoothing": 0.1}),
    own={row: (name, values[:2]) for row in ENDS for name, values in [DIGITS.own[row]]},
)
PHOTO_SCENES = SCENES._replace(
    base={"data": "scenes-cifar10", "num_labels": 2000, "epochs": 20},
    rates=(1e-3, 2e-3, 4e-3, 8e-3),
    decays=(0.05, 0.5),
)

# Contrasts ----------------------------------------------------------------------------------------

SCRATCH, COPY, DISTILLATION, TUNED = MAIN
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
        "recovery of copy": lambda of: compute_share(of, COPY, TUNED),
        "recovery of distillation": lambda of: compute_share(of, DISTILLATION, TUNED),
    }

    def change(*at: dict, compute: Callable) -> float:
        return compute(at[-1]) - compute(at[0])

    return {f"{what}: {first} → {last}": partial(change, compute=of) for what, of in asked.items()}


# The tables ---------------------------------------------------------------------------------------

EPOCHS = {50: 900, 100: 450, 300: 150, 997: 47}  # labels: epochs of about 900 steps
LABELS = {
    f"{labels} labels": CLUTTER[BASE] | {"num_labels": labels, "epochs": epochs}
    for labels, epochs in EPOCHS.items()
}
LENGTHS = {f"{epochs} epochs": CLUTTER[BASE] | {"epochs": epochs} for epochs in (150, 450, 1350)}
COMPONENTS = {
    name: CLUTTER[BASE] | {"model": f"micro+{component}"}
    for name, component in (
        ("LayerScale", "layer_scale=1e-5"), ("registers", "registers=4"),
        ("relative positions", "positions=relative"), ("rope", "positions=rope"),
        ("a norm before", "norm_pre=1"),
    )
}  # fmt: skip
AT_PHOTOS, SHORT = {"5,000 labels": {}}, {"5,000 labels": {"epochs": 12}}  # short: for tuning
PHOTO_LENGTHS = {"25 epochs": {}, "75 epochs": {"epochs": 75}}
PHOTO_LABELS = {  # at about 1,250 steps
    "1,000 labels": {"num_labels": 1000, "epochs": 125},
    "5,000 labels": {},
    "41,600 labels": {"num_labels": 41_600, "epochs": 3},
}
POINTER, TWINS = {"pointer": {}}, {"twins": {"scene": "twins", "num_labels": 500, "epochs": 100}}
DIAL = {f"{share:.0%} to one cell": {"dial": share} for share in (0.25, 0.5, 0.75, 1.0)}
HALF = "50% to one cell"
SCENE_LABELS = {  # at 300 steps, or more where there are more scenes
    f"{labels:,} scenes": {"num_labels": labels, "epochs": epochs}
    for labels, epochs in {100: 300, 300: 75, 1000: 40, 3000: 22}.items()
}


def list_steps(labels: int, epochs: int) -> dict[str, dict]:
    """1, 3, 10 and 30 times 300 steps."""
    return {
        f"{labels} scenes, {300 * times:,} steps": {"num_labels": labels, "epochs": times * epochs}
        for times in (1, 3, 10, 30)
    }


def choose_ends(points: dict[str, dict]) -> dict[str, dict]:
    """The first and the third of four points: those that are tuned."""
    return {name: points[name] for name in list(points)[::2]}


def thin_out(points: dict[str, dict], seeds: int) -> dict:
    """At the second and the fourth point scratch alone, at the fourth with three seeds."""
    _, second, _, fourth = points
    return {second: ((SCRATCH,), seeds), fourth: ((SCRATCH,), 3)}


AT_100, AT_300 = list_steps(100, 300), list_steps(300, 75)
scenes = partial(Table, study=SCENES, points=POINTER, rows=tuple(MAIN))
fair = partial(Table, study=FAIR, points=AT_BASE)
digits = partial(Table, study=DIGITS, points=AT_BASE, rows=tuple(MAIN))
photos = partial(Table, study=CIFAR, points=AT_PHOTOS, rows=tuple(MAIN))
LOOKS = "of each layer: shares of attention; divergence, nats; CKA"
looked = {"find": lambda _, runs: {"points": find_looks(runs), "measure": LOOKS}}
paired = {"rows": (*MAIN, *rows.AGAIN), "find": lambda _, runs: find_pairs(runs)}
TABLES = {
    "scenes-tuning": scenes("settings for the pointer", tunes=True,
        rows=(*ENDS, *rows.PROBE, "feature distillation")),
    "scenes-tuning-dial": scenes("settings where half of the pointers point to one cell",
        tunes=True, points={HALF: DIAL[HALF]}, rows=(SCRATCH, COPY, TUNED, "copy, mean maps")),
    "scenes-tuning-twins": scenes("settings for the twins", tunes=True, points=TWINS, rows=ENDS),
    "scenes-pointer": scenes(
        "pointer: the main rows, and maps that are not the image's own",
        rows=(*MAIN, *rows.PROBE, "feature distillation", "copy, mean maps", "copy, other maps",
              "copy, uniform maps", "copy, impulse maps", "copy, random teacher",
              "distillation, mean maps", "distillation, random teacher"),
        contrasts=share_of_gain("copy, mean maps", COPY) | subtract((COPY, TUNED)),
    ),
    "scenes-dial": scenes("from content to position: pointers that point to one cell",
        points=POINTER | DIAL, rows=(SCRATCH, COPY, TUNED, "copy, mean maps"), tuned_at=HALF,
        seeds=5),
    "scenes-labels": scenes("pointer: 100 to 3,000 labelled scenes", points=SCENE_LABELS,
        tuned_at="pointer", seeds=5, contrasts=along(SCENE_LABELS)),
    "scenes-layers": scenes("pointer: which layers, and which parts, are copied", seeds=5,
        rows=(*MAIN, *rows.SINGLE, "copy, layers :2", "copy, layers 2:4", *rows.PARTS)),
    "scenes-twins": scenes("twins: what is found must be compared", points=TWINS,
        rows=(*MAIN, "copy, mean maps", "copy, other maps", "distillation, layers all",
              "teacher's maps and weights", "distillation, mean maps"),
        contrasts=subtract((DISTILLATION, COPY), (TUNED, DISTILLATION))),
    "scenes-teachers": scenes("pointer: who taught without labels, with labels, or as an MAE",
        rows=(*MAIN, "copy, mean maps", *rows.WHOSE), seeds=5),
    "scenes-teachers-twins": scenes("twins: who taught without labels, or with labels", seeds=5,
        points=TWINS, rows=(*MAIN, "copy, mean maps", *list(rows.WHOSE)[:4])),
    "scenes-steps-tuning": scenes("settings for 100 scenes, at 300 steps and at 3,000", study=STEPS,
        tunes=True, rows=ENDS, points=choose_ends(AT_100)),
    "scenes-steps": scenes("pointer: 100 labelled scenes, 300 to 9,000 steps", study=STEPS,
        rows=ENDS, points=AT_100, tuned_at=list(AT_100)[2], fewer=thin_out(AT_100, 10)),
    "scenes-steps-300-tuning": scenes("settings for 300 scenes, at 300 steps and at 3,000",
        study=STEPS, tunes=True, rows=ENDS, points=choose_ends(AT_300)),
    "scenes-steps-300": scenes("pointer: 300 labelled scenes, 300 to 9,000 steps", study=STEPS,
        rows=ENDS, points=AT_300, tuned_at=list(AT_300)[2], fewer=thin_out(AT_300, 5), seeds=5),
    "scenes-looks": scenes("where nets look at a pointer", seeds=5, picture=draw_scenes, **looked),
    "scenes-looks-twins": scenes("where nets look at twins", seeds=5, points=TWINS, **looked),
    "scenes-looks-photos": scenes("where nets look among photographs", seeds=5,
        study=PHOTO_SCENES, **looked),
    "scenes-ensembles": scenes("pointer: pairs of nets and their controls", **paired),
    "scenes-tuning-photos": scenes("settings for a pointer among photographs of CIFAR-10",
        tunes=True, study=PHOTO_SCENES, rows=ENDS),
    "scenes-photos": scenes("pointer among photographs of CIFAR-10", seeds=5, study=PHOTO_SCENES,
        rows=(*ENDS, "copy, other maps", "copy, random teacher", "distillation, mean maps"),
        contrasts=share_of_gain("copy, mean maps", COPY)
        | subtract((COPY, TUNED), (DISTILLATION, COPY))),
    "digits-tuning": digits(
        "settings of the main rows for 0, 1 and 2 distractors; and which of these is the base task",
        rows=(*MAIN, *rows.PROBE, NEAREST), points=CLUTTER, tunes=True,
    ),
    "digits-clutter": digits("the main rows for 0, 1 and 2 distractors", points=CLUTTER,
        contrasts=along(CLUTTER)),
    "digits-labels": digits("the main rows for 50 to 997 labels, at equal steps", points=LABELS,
        tuned_at=BASE, contrasts=along(LABELS)),
    "digits-length": digits("the main rows for 150, 450 and 1,350 epochs", points=LENGTHS,
        tuned_at=BASE, contrasts=along(LENGTHS)),
    "digits-tuning-others": digits("settings of baselines and controls", tunes=True,
        rows=(*rows.BASELINES, *rows.CONTROLS, "copy, mean maps", "distillation, detached")),
    "digits-main": digits(
        "main rows, baselines and controls",
        rows=(*MAIN, *rows.PROBE, *rows.BASELINES, *rows.CONTROLS, NEAREST),
        contrasts=INTERACTION | subtract(
            ("feature distillation", DISTILLATION), ("copy, fine-tuned teacher", COPY),
            ("copy, fine-tuned teacher", TUNED), ("teacher's maps and weights", TUNED)),
    ),
    "digits-maps": digits(
        "other maps, copied and distilled: uniform to fine-tuned", rows=(*MAIN, *rows.LADDER),
        contrasts=share_of_gain("copy, mean maps", COPY)
        | subtract(("copy, mean maps", COPY), ("copy, impulse maps", TUNED))
        | share_of_gain("distillation, mean maps", DISTILLATION)
        | subtract(("distillation, fine-tuned teacher", DISTILLATION)),
    ),
    "digits-parts": digits("q, k, v or several copied", rows=(*MAIN, *rows.PARTS), seeds=5,
        contrasts=subtract(("copy of q", COPY), ("copy of v", COPY), ("copy of qkv", COPY),
                           ("copy of k", "copy of q"))),
    "digits-layers": digits(
        "which layers are copied (all, if not said) or distilled (:3)",
        rows=(*MAIN, *rows.LAYERS), seeds=5,
        contrasts=subtract(("copy, layers 2:4", "copy, layers :2"),
                           ("distillation, layers 2:4", "distillation, layers :2"),
                           ("distillation, layers all", DISTILLATION)),
    ),
    "digits-explained": digits(
        "distillation detached; without labels, then a probe",
        rows=(*MAIN, *rows.PROBE, *rows.EXPLAINED, "copy, layers :2", "distillation, layers :2"),
        against={"distillation, detached": DISTILLATION,
                 "linear probe of that": "linear probe of the teacher",
                 "linear probe of a random net": "linear probe of that"},
        contrasts=share_of_gain("distillation, detached", DISTILLATION)
        | subtract(("distillation, detached", COPY),  # tuning gave it two layers:
                   ("distillation, detached", "copy, layers :2"),
                   ("distillation, detached", "distillation, layers :2")),
    ),
    "digits-looks": digits("where rows and teachers look; how like the teacher's maps, features",
        rows=(*MAIN, "distillation, detached"), **looked),
    "digits-ensembles": digits("pairs of nets and controls; do they err together?", **paired),
    "digits-components": digits(
        "teachers with a component, students with and without it", points=COMPONENTS,
        rows=(*MAIN, *rows.MISMATCHED), seeds=5, tuned_at=BASE,
        against={SCRATCH: "from scratch, plain", "copy, plain student": COPY,
                 "distillation, plain student": DISTILLATION},
    ),
    "fair-tuning": fair("settings, for a start from sin-cos positions", tunes=True, rows=ENDS),
    "fair-main": fair("students that start from sin-cos positions, as their teachers",
        rows=(*ENDS, "copy, impulse maps", "copy, fine-tuned teacher", "distillation, mean maps"),
        contrasts=share_of_gain("copy, mean maps", COPY) | subtract((COPY, "copy, mean maps"))),
    "fair-whose": fair("whose maps? Students see the digits 5 to 9", seeds=5,
        points={"digits 5 to 9": {"classes": "5:"}}, tuned_at=BASE,
        rows=(*ENDS, *rows.FINE_TUNED), contrasts=subtract(*combinations(rows.FINE_TUNED, 2))),
    "cifar10-gate": photos("settings of the two ends; go on if they differ by 6 points",
        points=SHORT, rows=(SCRATCH, TUNED), tunes=True),
    "cifar10-tuning": photos("settings of copy and distillation",
        points=SHORT, rows=(COPY, DISTILLATION), tunes=True),
    "cifar10-main": photos("the main rows on photographs", seeds=5),
    "cifar10-controls": photos(
        "random teachers, the mean map, another image's, the teacher's weights as well", seeds=3,
        rows=(*MAIN, "copy, random teacher", "distillation, random teacher", "copy, mean maps",
              "copy, other maps", "copy, impulse maps", "distillation, mean maps",
              "teacher's maps and weights"),
        against={"copy, mean maps": COPY, "copy, other maps": COPY, "copy, impulse maps": COPY,
                 "distillation, mean maps": DISTILLATION, "teacher's maps and weights": TUNED},
        contrasts=INTERACTION | share_of_gain("copy, mean maps", COPY)
        | share_of_gain("distillation, mean maps", DISTILLATION),
    ),
    "cifar10-looks": photos("are maps and features like the teacher's?", seeds=5, **looked),
    "cifar10-length": photos("the main rows, three times as long", seeds=3, points=PHOTO_LENGTHS,
        tuned_at="5,000 labels", contrasts=along(PHOTO_LENGTHS)),
    "cifar10-labels": photos("the main rows with 1,000 to 41,600 labels, at equal steps", seeds=1,
        points=PHOTO_LABELS, tuned_at="5,000 labels", contrasts=along(PHOTO_LABELS)),
    "cifar10-fair-tuning": photos("settings, for students that start from sin-cos positions",
        study=FAIR_CIFAR, points=SHORT, rows=ENDS, tunes=True),
    "cifar10-fair": photos("students that start from sin-cos positions, as their teacher", seeds=3,
        study=FAIR_CIFAR, rows=(*ENDS, "copy, fine-tuned teacher", "copy, its mean maps"),
        contrasts=share_of_gain("copy, mean maps", COPY)),
    "cifar10-fair-teacher": photos("a fair start, with a second teacher of the same recipe",
        study=FAIR_CIFAR._replace(teacher_seed=1), rows=(SCRATCH, COPY, TUNED, ENDS[-1]), seeds=3,
        contrasts=share_of_gain("copy, mean maps", COPY)),
    "cifar10-fair-length-tuning": photos("fine-tuning's settings, three times as long",
        study=FAIR_CIFAR, points={"75 epochs": {"epochs": 75}}, rows=(TUNED,), tunes=True),
    "cifar10-fair-length": photos("a fair start, three times as long", study=FAIR_CIFAR, seeds=3,
        points=PHOTO_LENGTHS, tuned_at="5,000 labels", rows=(SCRATCH, COPY, TUNED, ENDS[-1]),
        contrasts={k: f for k, f in along(PHOTO_LENGTHS).items() if "distillation" not in k}),
    "cifar10-recipe": photos("the main rows as --data cifar10 has them (takes a GPU)",
        study=RECIPE, points={"50,000 labels": {"model": "tiny"}}, seeds=3),
}  # fmt: skip
