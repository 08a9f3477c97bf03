"""The studies, and their tables: which rows, at which points, compared with what."""

from functools import partial

from study import rows
from study.engine import Study, Table, share_of_gain, subtract
from study.looks import find_likeness, find_looks
from study.rows import AT_BASE, BASE, COPY, DISTILLATION, MAIN, MEAN, SCRATCH, TUNED

# The studies
DROPS, DECAYS = ("drop_path", (0.0, 0.1, 0.2)), ("layer_decay", (0.75, 1.0, 0.5))
COPIED, DISTILLED = ("layers", ("all", ":3", ":2")), ("layers", (":3", "all", ":2"))
WEIGHTS, PROBING = ("attention_weight", (3.0, 1.0, 10.0)), ("lr", (4e-3, 3.2e-2, 6.4e-2))
ENDS, LEARNERS, COPIES = (*MAIN, MEAN), (SCRATCH, COPY, DISTILLATION), (SCRATCH, COPY, TUNED, MEAN)
OWN = {SCRATCH: DROPS, COPY: COPIED, DISTILLATION: DISTILLED, TUNED: DECAYS, MEAN: COPIED}
VARIED = dict(zip(rows.VARIED, (DISTILLED, COPIED, DECAYS, DECAYS, COPIED, WEIGHTS), strict=True))
VARIED |= dict.fromkeys(rows.PROBE, PROBING)
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
WEIGHED = {  # five weights around what suits the size of each loss
    row: ("attention_weight", tuple(middle * times for times in (1, 0.1, 0.3, 3, 10)))
    for row, middle in zip(rows.LOSSES, (3.0, 10.0, 10.0, 1.0), strict=True)
}
FAIR = Study(  # students start from sin-cos positions, as their teachers
    rows=rows.ROWS,
    base={"data": "digits", "num_labels": 100, "epochs": 450, "positions": "sincos"},
    seeds=(100, 101), rates=RATES[1:5], decays=(0.05, 0.2, 0.5, 1.5), own=OWN)  # fmt: skip
DIGITS = FAIR._replace(base=dict(FAIR.base), rates=RATES, own=OWN | VARIED | WEIGHED)
PLAIN = dict.fromkeys(("mixup", "cutmix", "random_erase", "smoothing", "ema", "drop_path"), 0.0)
CIFAR = Study(  # small enough for a CPU: shifts and flips, a tenth of the labels
    rows=rows.ROWS,
    base={"data": "cifar10", "model": "mini", "holdout": 0.1, "num_labels": 5000}
    | {"epochs": 25, "batch": 100, "positions": "sincos"} | PLAIN,
    teacher={"epochs": 60, "batch": 512, "lr": 1.5e-3, "decoder_dim": 96, "decoder_depth": 1},
    images=("data", "model", "holdout"),
    teacher_seed=0, seeds=(100,), rates=RATES[:3], decays=(0.3,),
    own={SCRATCH: ("drop_path", (0.0,)), COPY: ("layers", ("all",)), MEAN: ("layers", ("all",)),
         DISTILLATION: ("layers", (":5",)), TUNED: ("layer_decay", (0.75,)),
         "beside": ("layers", (":5",))},
)  # fmt: skip
WIDE = CIFAR._replace(base=dict(CIFAR.base), rates=(5e-4, *RATES))  # another base: tuned anew
RECIPE = CIFAR._replace(base={"data": "cifar10", "recipe": "gpu"}, teacher={}, own={},
    images=("data", "model"))  # fmt: skip
UNMIXED = {"mixup": 0.0}  # unless a table says so: the recipe of copy has MixUp
SCENES = Study(
    rows=rows.ROWS,
    base={"data": "scenes", "num_labels": 300, "epochs": 75} | UNMIXED,
    images=("data", "scene", "model"),  # whatever the dial, the teacher's pointers point anywhere
    seeds=(100, 101), rates=RATES[1:5], decays=(0.05, 0.5, 1.5),
    own=OWN | {"beside": DISTILLED} | dict.fromkeys(rows.PROBE, PROBING)
    | dict.fromkeys(rows.FEATURES, WEIGHTS),
)  # fmt: skip
MEAN_ABOVE, CENTRE_ABOVE, _ = rows.ABOVE
STEPS = SCENES._replace(  # tuned at both ends of an axis of training
    rates=(2.5e-4, 5e-4, *RATES, 6.4e-2),
    mixes=({"mixup": 0.8}, {"smoothing": 0.1}, {"mixup": 0.8, "smoothing": 0.1}),
    own={row: (name, values[:2]) for row, (name, values) in (OWN | VARIED).items()}
    | WEIGHED | dict.fromkeys(rows.FEATURES, WEIGHTS)
    | dict.fromkeys((MEAN_ABOVE, CENTRE_ABOVE, *rows.READ), ("drop_path", (0.0, 0.1)))
    | dict.fromkeys(rows.PIXELS, ("attention_weight", (1.0, 0.3, 3.0, 10.0))),
)  # fmt: skip
CONSTANT = STEPS._replace(joint=(1.5,))
TWINNED = SCENES._replace(rates=(5e-4, *RATES, 6.4e-2), decays=(0.05, 0.5, 1.5, 5.0), joint=(1.5,))
DECAYED = STEPS._replace(decays=(0.05, 0.5, 1.5, 5.0, 15.0), joint=(1.5, 5.0))
MAES = SCENES._replace(joint=(1.5,), rates=RATES[2:], own=OWN | dict.fromkeys(rows.MAES, COPIED))
PHOTO_SCENES = SCENES._replace(rates=RATES[:4], decays=(0.05, 0.5),
    base={"data": "scenes-cifar10", "num_labels": 2000, "epochs": 20} | UNMIXED)  # fmt: skip
LONG = STEPS._replace(seeds=(100,), rates=(2.5e-4, 1e-3, 4e-3, 1.6e-2))  # ten times the steps
JOINTLY = LONG._replace(joint=(1.5, 5.0))
PHOTOS_LONG = JOINTLY._replace(base=PHOTO_SCENES.base, rates=(2.5e-4, *RATES[:5]))
PHOTOS_LOW = PHOTOS_LONG._replace(rates=(6e-5, 1.2e-4, *PHOTOS_LONG.rates),
    decays=DECAYED.decays, joint=DECAYED.decays[2:])  # fmt: skip
PHOTOGRAPHS = Study(  # with a public teacher, which has learned these classes
    rows=rows.ROWS | {"beside": rows.beside(tuned_as=DISTILLATION)},
    base={"data": "folder", "image_size": 96, "patch": 16, "model": "tiny", "num_labels": 2000}
    | {"epochs": 30, "batch": 64, "crop_area": 0.3, "positions": "sincos", "amp": "bf16"},
    published="deit_tiny_patch16_224.fb_in1k",
    seeds=(100,), rates=(5e-5, 2e-4, 8e-4, 3e-3, 1.2e-2), decays=(0.05,),
    own={SCRATCH: ("drop_path", (0.1,)), TUNED: ("layer_decay", (0.75,))}
    | dict.fromkeys((COPY, MEAN), ("layers", ("all",)))
    | {DISTILLATION: ("layers", ("75%",))}
    | dict.fromkeys(rows.PROBE, ("lr", (8e-4, 5e-2, 0.2))),
)  # fmt: skip
AUGREG = PHOTOGRAPHS._replace(published="vit_tiny_patch16_224.augreg_in21k_ft_in1k")

# The points
AT_PHOTOS, SHORT = {"5,000 labels": {}}, {"5,000 labels": {"epochs": 12}}  # short: for tuning
LENGTHS = {"25 epochs": {}, "75 epochs": {"epochs": 75}}
POINTER, TWINS = {"pointer": {}}, {"twins": {"scene": "twins", "num_labels": 500, "epochs": 100}}
DIAL = {f"{share:.0%} to one cell": {"dial": share} for share in (0.25, 0.5, 0.75, 1.0)}
HALF = "50% to one cell"
SCENE_LABELS = {  # at 300 steps, or more where there are more scenes
    f"{labels:,} scenes": {"num_labels": labels, "epochs": epochs}
    for labels, epochs in {100: 300, 300: 75, 1000: 40, 3000: 22}.items()
}
TIMES = {"300": 1, "900": 3, "3,000": 10, "9,000": 30}  # by steps
AT_100 = {
    f"100 scenes, {name} steps": {"num_labels": 100, "epochs": 300 * n} for name, n in TIMES.items()
}
AT_300 = {  # scenes-pointer has 300 steps
    f"300 scenes, {name} steps": {"num_labels": 300, "epochs": 75 * n}
    for name, n in TIMES.items() if n > 1}  # fmt: skip
FIRST_100, _, LAST_100, _ = ({name: point} for name, point in AT_100.items())
_, LAST_300, _ = ({name: point} for name, point in AT_300.items())
LAST_TWINS = {"twins, 7,000 steps": TWINS["twins"] | {"epochs": 1000}}
LAST_PHOTOS = {"6,200 steps": {"epochs": 200}}
TO_3000 = dict([*AT_100.items()][:3])
SHORT_100 = dict(zip(("300 steps", "900 steps"), AT_100.values(), strict=False))
ON_PHOTOGRAPHS, UNSEEN = "2,000 photographs", {"2,000 images": {"data": "cifar10", "holdout": 0.1}}
LONGER = {f"{ON_PHOTOGRAPHS}, 90 epochs": {"epochs": 90}}
AT_128 = {f"{n} epochs": {"image_size": 128, "epochs": n} for n in (30, 90)}
FIRST_128, LAST_128 = ({name: point} for name, point in AT_128.items())

# The tables
scenes = partial(Table, study=SCENES, points=POINTER, rows=tuple(MAIN))
steps = partial(scenes, study=STEPS)
constant = partial(scenes, study=CONSTANT)
fair = partial(Table, study=FAIR, points=AT_BASE)
digits = partial(fair, study=DIGITS)
photos = partial(Table, study=CIFAR, points=AT_PHOTOS, rows=ENDS, seeds=3)
looked = {"seeds": 5, "find": find_looks}
SAME, ITS_MEAN, OTHER, MEAN_OTHER = rows.FINE_TUNED
OF_GAIN = share_of_gain(MEAN, COPY)
BESIDE = subtract(("beside", DISTILLATION), ("beside", "beside, random teacher"))
HELD = subtract(("maps, then labels", "maps, then labels, maps held"))
UNUSED = "settings of maps that are not looked with"
why = {"find": find_likeness, "rows": (*MAIN, *rows.WHY), "contrasts": BESIDE | HELD}
losses = {"rows": (*rows.LOSSES,), "against": dict.fromkeys(rows.LOSSES, next(iter(rows.LOSSES)))}
seeds = {"rows": (COPY, *rows.PAIR), "against": dict.fromkeys(rows.PAIR, COPY)}
seeds["contrasts"] = subtract(rows.PAIR)
TEACHERS = (SCRATCH, COPY, MEAN, *rows.MAES)
SHOWN = (DISTILLATION, "copy, other maps")
OTHERS = ("copy, other maps", "copy, random teacher", "beside")
public = partial(Table, study=PHOTOGRAPHS, points={ON_PHOTOGRAPHS: {}}, seeds=3,
    tuned_at=(ON_PHOTOGRAPHS,), rows=ENDS)  # fmt: skip
TABLES = {
    "scenes-tuning": scenes("settings", tunes=True, rows=(*ENDS, *rows.PROBE, *rows.FEATURES)),
    "scenes-tuning-dial": scenes("settings where half of the pointers point to one cell",
        tunes=True, points={HALF: DIAL[HALF]}, rows=COPIES),
    "scenes-tuning-twins": scenes("settings for the twins", tunes=True, points=TWINS,
        study=TWINNED, rows=(*ENDS, "beside")),
    "scenes-pointer": scenes("pointer: the main rows, and maps that are not the image's own",
        rows=(*MAIN, *rows.PROBE, *rows.FEATURES, *rows.CONTROLS),
        contrasts=OF_GAIN | subtract((COPY, TUNED))),
    "scenes-dial": scenes("from content to position: pointers that point to one cell",
        points=POINTER | DIAL, rows=COPIES, tuned_at=(HALF,), seeds=5),
    "scenes-labels": scenes("pointer: 100 to 3,000 labelled scenes", points=SCENE_LABELS,
        tuned_at=("pointer",), seeds=5),
    "scenes-layers": scenes("pointer: which layers, and which parts, are copied", seeds=5,
        rows=(*MAIN, *rows.SINGLE, "copy, layers :2", "copy, layers 2:4", *rows.PARTS)),
    "scenes-twins": scenes("twins: what is found is compared", points=TWINS, contrasts=subtract(
        (DISTILLATION, COPY), (TUNED, DISTILLATION), ("beside", DISTILLATION),
        (TUNED, *rows.START), (*rows.START, COPY)), rows=(*MAIN, MEAN,
        "copy, other maps", "distillation, layers all", "teacher's maps and weights",
        "distillation, mean maps", "beside", "beside, random teacher")),
    "scenes-teachers": scenes("pointer: who taught?", rows=(*ENDS, *rows.WHOSE), seeds=5),
    "scenes-steps-tuning": steps("100 scenes", tunes=True, rows=ENDS, points=FIRST_100 | LAST_100),
    "scenes-steps": steps("pointer: 100 labelled scenes, 300 to 9,000 steps", rows=ENDS,
        points=AT_100, tuned_at=tuple(LAST_100), fewer={"100 scenes, 900 steps":
        ((SCRATCH,), 10), "100 scenes, 9,000 steps": ((SCRATCH,), 3)}),
    "scenes-steps-300-tuning": scenes("settings of scratch, 300 scenes, 3,000 steps",
        study=LONG, points=LAST_300, tunes=True, rows=(SCRATCH,)),
    "scenes-steps-300": scenes("pointer: 300 labelled scenes, 900 to 9,000 steps", study=LONG,
        rows=ENDS, seeds=5, points=AT_300, tuned_at=("pointer", *LAST_300), fewer={"300 scenes, "
        "900 steps": ((SCRATCH,), 5), "300 scenes, 9,000 steps": ((SCRATCH,), 3)}),
    "scenes-decays-tuning": steps("scratch, 3,000 steps: high rates with high weight decays",
        study=STEPS._replace(rates=RATES[2:], joint=(0.5, 1.5)), tunes=True, rows=(SCRATCH,),
        points={"100 scenes, jointly": AT_100["100 scenes, 3,000 steps"]}),
    "scenes-controls-tuning": steps("settings of feature distillation, 100 scenes", tunes=True,
        points=FIRST_100, rows=tuple(rows.FEATURES)),
    "scenes-controls": steps("100 scenes: what else could help", points=FIRST_100,
        rows=(*MAIN, *rows.PROBE, *rows.FEATURES, *rows.PARTS, *rows.CONTROLS),
        contrasts=OF_GAIN | subtract((COPY, TUNED), ("distillation, mean maps", SCRATCH))),
    "scenes-constant-tuning": constant("settings of constant maps, 300 and 900 steps", tunes=True,
        points=SHORT_100, rows=(*COPIES, MEAN_ABOVE, CENTRE_ABOVE)),
    "scenes-constant": constant("100 scenes: constant maps where layer 0 is free", points=SHORT_100,
        rows=(*COPIES, "copy, layer 0", *rows.ABOVE),
        contrasts=subtract((COPY, MEAN_ABOVE), (MEAN_ABOVE, CENTRE_ABOVE), points=SHORT_100)),
    "scenes-mae-tuning": scenes("settings of an MAE's maps", study=MAES, tunes=True,
        points={"300 labels": SCENE_LABELS["300 scenes"]}, rows=TEACHERS),
    "scenes-mae": scenes("pointer: an MAE's maps, tuned like the others", study=MAES, seeds=5,
        points={f"{n} labels": SCENE_LABELS[f"{n} scenes"] for n in (300, 100)},
        tuned_at=("300 labels",), rows=TEACHERS),
    "scenes-looks": scenes("where nets look at a pointer", **looked),
    "scenes-looks-twins": scenes("where nets look at twins", points=TWINS, **looked),
    "scenes-tuning-photos": scenes("settings for a pointer among photographs of CIFAR-10",
        tunes=True, study=PHOTO_SCENES, rows=ENDS),
    "scenes-photos": scenes("pointer among photographs of CIFAR-10", seeds=5, study=PHOTO_SCENES,
        rows=(*ENDS, "copy, other maps", "copy, random teacher", "distillation, mean maps"),
        contrasts=OF_GAIN | subtract((COPY, TUNED), (DISTILLATION, COPY))),
    "fair-tuning": fair("settings for the digits", tunes=True, rows=ENDS),
    "fair-main": fair("digits: students that start from sin-cos positions, as their teachers",
        rows=(*ENDS, "copy, impulse maps", "copy, fine-tuned teacher", "distillation, mean maps"),
        contrasts=OF_GAIN | subtract((COPY, MEAN))),
    "fair-whose": fair("whose maps? Students see the digits 5 to 9", seeds=5, tuned_at=(BASE,),
        points={"digits 5 to 9": {"classes": "5:"}}, rows=(*ENDS, *rows.FINE_TUNED),
        contrasts=subtract((SAME, ITS_MEAN), (SAME, OTHER), (OTHER, MEAN_OTHER))),
    "fair-length": fair("digits, three times as long", points={"1,350 epochs": {"epochs": 1350}},
        tuned_at=(BASE,), rows=ENDS, seeds=5, contrasts=OF_GAIN),
    "cifar10-fair-tuning": photos("settings for CIFAR-10", points=SHORT, tunes=True),
    "cifar10-fair": photos("CIFAR-10: students start from the positions of their teacher",
        rows=(*ENDS, "copy, fine-tuned teacher", "copy, its mean maps"), contrasts=OF_GAIN),
    "cifar10-fair-teacher": photos("CIFAR-10: a second teacher of the same recipe",
        study=CIFAR._replace(teacher_seed=1), rows=COPIES, contrasts=OF_GAIN),
    "cifar10-fair-length-tuning": photos("fine-tuning's settings, three times as long",
        points={"75 epochs": {"epochs": 75}}, rows=(TUNED,), tunes=True),
    "cifar10-fair-length": photos("CIFAR-10, three times as long", points=LENGTHS, rows=COPIES,
        tuned_at=("5,000 labels",)),
    "cifar10-recipe": photos("the main rows as --recipe gpu has them (takes a GPU)", study=RECIPE,
        points={"50,000 labels": {"model": "tiny"}}, rows=tuple(MAIN)),
    "why-digits-tuning": digits("settings of digits over more rates", tunes=True, rows=(*MAIN,)),
    "why-digits-tuning-more": digits(UNUSED, tunes=True, rows=tuple(VARIED)),
    "why-digits": digits("do maps have to be looked with? Digits", **why),
    "why-pointer-tuning": steps(UNUSED, points=FIRST_100, tunes=True, rows=tuple(VARIED)),
    "why-pointer-tuning-more": steps("beside: every rate with strong weight decays", tunes=True,
        study=DECAYED, points=FIRST_100, rows=("beside",)),
    "why-pointer": steps("do maps have to be looked with? 100 scenes", points=FIRST_100, **why),
    "why-seeds-digits": digits("distilled maps of two seeds, digits", **seeds),
    "why-seeds-pointer": steps("distilled maps of two seeds, scenes", points=FIRST_100, **seeds),
    "why-pointer-long-tuning": steps("beside, long", points=LAST_100, tunes=True, rows=("beside",)),
    "why-pointer-long-tuning-more": steps("beside, long: more decays", points=LAST_100, tunes=True,
        study=DECAYED._replace(rates=RATES[1:], decays=(0.5, 1.5, 5.0)), rows=("beside",)),
    "why-pointer-long": steps("do maps have to be looked with? 100 scenes, 3,000 steps", seeds=5,
        points=LAST_100, rows=(*MAIN, "beside", "beside, random teacher"), contrasts=BESIDE),
    "why-cifar10-tuning": photos("settings for CIFAR-10, over more rates", study=WIDE, points=SHORT,
        tunes=True, rows=(*ENDS, "beside")),
    "why-cifar10": photos("do maps have to be looked with? CIFAR-10", study=WIDE, rows=(*ENDS,
        "beside", "beside, random teacher"), find=find_likeness, contrasts=BESIDE),
    "losses-pointer-tuning": steps("rates and weights of four losses", points=FIRST_100,
        tunes=True, rows=tuple(rows.LOSSES)),
    "losses-pointer": steps("four losses of maps, 100 scenes", points=FIRST_100, **losses),
    "losses-digits-tuning": digits("settings of four losses", tunes=True, rows=(*rows.LOSSES,)),
    "losses-digits": digits("four losses of maps, digits", **losses),
    "scenes-oracle-tuning": steps("settings of scratch with the teacher's task", tunes=True,
        points=LAST_100, rows=tuple(rows.PIXELS)),
    "scenes-oracle": steps("what of the teacher's knowledge is worth it? 100 scenes", seeds=5,
        points=LAST_100, rows=(*MAIN, *rows.PIXELS, *rows.ORACLE)),
    "scenes-read-tuning": scenes("settings of scratch, read at the centre", tunes=True,
        study=DECAYED, points=FIRST_100 | LAST_100, rows=tuple(rows.READ)),
    "scenes-read": steps("scratch, read at the centre: 100 scenes, 300 to 3,000 steps", seeds=5,
        points=TO_3000, tuned_at=tuple(LAST_100), rows=(*MAIN, *rows.READ),
        contrasts=subtract((COPY, *rows.READ), points=TO_3000)),
    "scenes-steps-twins-tuning": scenes("settings of scratch on twins, 7,000 steps",
        study=JOINTLY, points=LAST_TWINS, tunes=True, rows=(SCRATCH,)),
    "scenes-steps-twins": scenes("twins, 7,000 steps", study=JOINTLY, points=LAST_TWINS,
        tuned_at=("twins",), rows=(SCRATCH, COPY), seeds=5),
    "scenes-steps-photos-tuning": scenes("settings of scratch among photographs, 6,200 steps",
        study=PHOTOS_LONG, points=LAST_PHOTOS, tunes=True, rows=(SCRATCH,)),
    "scenes-read-photos-tuning": scenes("settings of scratch, read at the centre, photographs",
        study=PHOTOS_LOW, points=LAST_PHOTOS, tunes=True, rows=tuple(rows.READ)),
    "scenes-steps-photos": scenes("pointer among photographs, 6,200 steps", study=PHOTOS_LONG,
        points=LAST_PHOTOS, tuned_at=("pointer",), rows=(SCRATCH, COPY, *rows.READ), seeds=5,
        contrasts=subtract((COPY, *rows.READ))),
    "photos-tuning": public("settings with a public teacher (10 epochs)", tunes=True,
        points={ON_PHOTOGRAPHS: {"epochs": 10}}, rows=(*ENDS, *rows.PROBE)),
    "photos-deit": public("DeiT-Ti's maps, photographs, 96 pixels", rows=(*ENDS, *rows.PROBE,
        *OTHERS), contrasts=OF_GAIN | subtract(("beside", DISTILLATION))),
    "photos-layers": public("DeiT-Ti's maps in other layers, and controls, 96 pixels",
        rows=(SCRATCH, COPY, "copy, layers :4", "copy, layers :8", "copy, uniform maps",
        "distillation, layers all", "distillation, mean maps")),
    "photos-deit-long": public("DeiT's maps, 96 pixels, 90 epochs", points=LONGER, rows=LEARNERS),
    "photos-128": public("DeiT-Ti's maps, photographs, 128 pixels", points=AT_128,
        contrasts=OF_GAIN, fewer={"90 epochs": ((SCRATCH,), 3)}),
    "photos-128-all": public("all photographs, 128 pixels", rows=COPIES, seeds=1,
        contrasts=OF_GAIN, points={"9,469 photographs": {"image_size": 128, "num_labels": 0}}),
    "photos-looks": public("where nets look at photographs", rows=LEARNERS, find=find_looks),
    "photos-looks-long": public("after 90 epochs", points=LONGER, rows=LEARNERS, find=find_looks),
    "photos-augreg": public("AugReg-Ti's maps, 96 pixels", study=AUGREG, contrasts=OF_GAIN),
    "photos-128-augreg": public("AugReg-Ti's maps, 128 pixels", study=AUGREG, contrasts=OF_GAIN,
        points=FIRST_128),
    "photos-128-long": public("DeiT-Ti's maps, 128 pixels, 90 epochs", points=LAST_128,
        rows=LEARNERS, contrasts=subtract((COPY, DISTILLATION))),
    "photos-128-controls": public("other maps, and beside, 128 pixels", points=FIRST_128,
        rows=(COPY, DISTILLATION, *OTHERS), contrasts=subtract(("beside", DISTILLATION)),
        against=dict.fromkeys((DISTILLATION, *OTHERS), COPY)),
    "photos-cifar10": public("DeiT, CIFAR-10", points=UNSEEN, rows=COPIES, contrasts=OF_GAIN),
    "photos-cifar10-more": public("DeiT-Ti's maps, CIFAR-10, against copy", points=UNSEEN,
        rows=(COPY, *SHOWN), against=dict.fromkeys(SHOWN, COPY)),
}  # fmt: skip
