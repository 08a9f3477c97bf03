"""The rows of the study: which script, which teacher, what is changed, whose settings."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import recipes

Flags = Mapping[str, Any]  # settings by name
NOTHING: Flags = MappingProxyType({})


class Row(NamedTuple):
    script: str  # of jobs.SCRIPTS
    teacher: str  # none, random, pre-trained, the row whose net it is, or "" for no such setting
    flags: Flags = NOTHING  # what makes it this row
    tuned_as: str = ""  # the row whose settings it takes if it is not tuned itself
    apart: int = 0  # of the lender's seed: a net without a teacher begins as its own student would


BASE = f"{recipes.Images.distractors} distractor"
AT_BASE = {BASE: {"distractors": recipes.Images.distractors}}

MAIN = {
    "from scratch": Row("finetune", "none"),
    "attention copy": Row("copy", "pre-trained"),
    "attention distillation": Row("distill", "pre-trained"),
    "fine-tuning": Row("finetune", "pre-trained"),
}
SCRATCH, COPY, DISTILLATION, TUNED = MAIN
PAPER = dict(zip(MAIN, (83.0, 85.1, 85.7, 85.7), strict=True))  # ImageNet-1K, ViT-L, MAE teacher


def copied(teacher="pre-trained", tuned_as=COPY, **flags) -> Row:
    return Row("variants", teacher, flags, tuned_as)


def distilled(**flags) -> Row:
    return Row("variants", "pre-trained", {"how": "distill"} | flags, DISTILLATION)


PROBE = {"linear probe of the teacher": Row("variants", "pre-trained", {"how": "probe"})}
FEATURES = {"feature distillation": Row("variants", "pre-trained", {"how": "features"})}
MEAN = "copy, mean maps"
CONTROLS = {
    **{f"copy, {maps} maps": copied(maps=maps) for maps in ("uniform", "impulse", "mean", "other")},
    "distillation, mean maps": distilled(maps="mean"),
    "copy, random teacher": Row("copy", "random", tuned_as=COPY),
    "distillation, random teacher": Row("distill", "random", tuned_as=DISTILLATION),
}
PARTS = {f"copy of {part}": copied(lend=part) for part in ("q", "k", "v", "qkv")}
SINGLE = {f"copy, layer {i}": copied(layers=str(i)) for i in range(4)}
LAYERS = {f"copy, layers {which}": copied(layers=which) for which in (":2", "2:4", ":4", ":8")}
LAYERS |= {"distillation, layers all": distilled(layers="all")}
START = {"teacher's maps and weights": copied(tuned_as=TUNED, start="teacher", layers="all")}
ABOVE = {  # layer 0, in which pointers point, is free
    f"copy, {maps} maps, layers 1:": copied(maps=maps, layers="1:", tuned_as=tuned_as)
    for maps, tuned_as in (("mean", ""), ("centre", ""), ("uniform", "copy, mean maps, layers 1:"))
}
ALL_SCENES = {"num_labels": 0, "epochs": 13}
LABELLED = ALL_SCENES | {"classes": ":5", "lr": 2e-3, "drop_path": 0.1}
KNOWING = {  # teachers that scenes may have, besides the one without labels
    "a teacher with labels": Row("finetune", "none", LABELLED),
    "an MAE": Row("pretrain", "", {"target": "masked", "num_labels": 0, "epochs": 39}),
}
NARROW = {  # as many steps as the usual teacher has
    "a teacher of 300 scenes": Row("pretrain", "", {"num_labels": 300, "epochs": 1015}),
    "a teacher of two classes": Row("pretrain", "", ALL_SCENES | {"classes": ":2"}),
}


def teach(teachers, taught) -> dict[str, Row]:
    usual, apart = MAIN | {MEAN: CONTROLS[MEAN]}, {"a teacher with labels": 50}
    return {
        f"{row}, {name}": usual[row]._replace(teacher=name, tuned_as=row, apart=apart.get(name, 0))
        for name in teachers for row in taught
    }  # fmt: skip


WHOSE = teach(KNOWING, (COPY, MEAN, DISTILLATION, TUNED))
MAES = teach(["an MAE"], (COPY, MEAN))
ORACLE = teach([*NARROW, "an MAE"], (COPY, DISTILLATION, TUNED))
PIXELS = {"scratch, and the cell's pixels": Row("variants", "none", {"how": "pixels"})}
READ = {"scratch, read at the centre": Row("variants", "none", {"how": "centre"})}
ELSEWHERE = "fine-tuned on other classes"
OTHERS = {ELSEWHERE: Row("finetune", "pre-trained", {"classes": ":5"}, TUNED)}
FINE_TUNED = {
    "copy, fine-tuned teacher": Row("copy", TUNED, tuned_as=COPY),
    "copy, its mean maps": copied(TUNED, MEAN, maps="mean"),
    f"copy, {ELSEWHERE}": Row("copy", ELSEWHERE, tuned_as=COPY),
    f"copy, {ELSEWHERE}, mean": copied(ELSEWHERE, MEAN, maps="mean"),
}


def beside(teacher="pre-trained", tuned_as="beside", **flags) -> Row:
    return Row("variants", teacher, {"how": "beside"} | flags, tuned_as)


ALONE = {"maps alone": distilled(class_weight=0.0)}
VARIED = {  # tuned as the main rows are
    "beside": beside(tuned_as=""),
    "copy and beside": Row("variants", "pre-trained", {"how": "copy-beside"}),
    "maps, then labels": Row("finetune", "maps alone"),
    "maps, then labels, maps held": Row("variants", "maps alone", {"start": "teacher"}),
    "copy of distilled maps": Row("copy", DISTILLATION),
    "beside, tokens": beside(tuned_as="", maps="tokens"),
}
BESIDE = {
    "beside, random teacher": beside("random"),
    "beside, mean maps": beside(maps="mean"),
    "beside, other maps": beside(maps="other"),
}
PROBED = {
    f"linear probe of {row}": Row("variants", row, {"how": "probe"}, *PROBE)
    for row in (SCRATCH, DISTILLATION, "beside", "maps alone")
}
PAIR = ("copy of distilled maps", "copy of distilled maps, another seed")
PAIRED = {PAIR[1]: Row("copy", DISTILLATION, tuned_as=PAIR[0], apart=50)}
WHY = VARIED | BESIDE | PROBE | PROBED
LOSSES = {
    f"distillation by {loss}": Row("variants", "pre-trained", {"how": "distill", "loss": loss})
    for loss in ("cross-entropy", "jensen-shannon", "squared", "scores")
}
ROWS = MAIN | FEATURES | CONTROLS | START | PARTS | SINGLE | LAYERS | KNOWING | NARROW
ROWS |= WHOSE | ORACLE | ABOVE | PIXELS | READ | OTHERS | FINE_TUNED | ALONE | WHY | PAIRED | LOSSES
