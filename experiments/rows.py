"""The rows of the study: which script, which teacher, what is changed, whose settings."""

import data
from experiments.study import Row

CLUTTER = {f"{n} distractor{'s' * (n != 1)}": {"distractors": n} for n in (0, 1, 2)}
BASE = list(CLUTTER)[data.Images.distractors]  # by the rule in LOG.md, section 3
AT_BASE = {BASE: CLUTTER[BASE]}

MAIN = {
    "from scratch": Row("finetune", "none"),
    "attention copy": Row("copy", "pre-trained"),
    "attention distillation": Row("distill", "pre-trained"),
    "fine-tuning": Row("finetune", "pre-trained"),
}
PAPER = dict(zip(MAIN, (83.0, 85.1, 85.7, 85.7), strict=True))  # ImageNet-1K, ViT-L, MAE teacher
PROBE = {"linear probe of the teacher": Row("variants", "pre-trained", {"how": "probe"})}
BASELINES = {
    "feature distillation": Row("variants", "pre-trained", {"how": "features"}),
    "logit distillation": Row("variants", "fine-tuning", {"how": "logits"}),
}


def copied(**flags) -> Row:
    return Row("variants", "pre-trained", flags, tuned_as="attention copy")


def distilled(**flags) -> Row:
    return Row("variants", "pre-trained", {"how": "distill"} | flags, "attention distillation")


def probed(teacher: str) -> Row:
    return Row("variants", teacher, {"how": "probe"}, "linear probe of the teacher")


CONTROLS = {
    "copy, random teacher": Row("copy", "random", tuned_as="attention copy"),
    "distillation, random teacher": Row("distill", "random", tuned_as="attention distillation"),
    "copy, fine-tuned teacher": Row("copy", "fine-tuning", tuned_as="attention copy"),
    "teacher's maps and weights": copied(start="teacher", layer_decay=0.75),
}
MAPS = ("uniform", "impulse", "mean", "other")
LADDER = {
    **{f"copy, {maps} maps": copied(maps=maps) for maps in MAPS},
    **{f"distillation, {maps} maps": distilled(maps=maps) for maps in MAPS},
    "distillation, fine-tuned teacher": Row("distill", "fine-tuning", {}, "attention distillation"),
}
PARTS = {f"copy of {part}": copied(lend=part) for part in ("q", "k", "v", "qkv")}
WHICH = (":1", ":2", "1:4", "2:4", "3:")
LAYERS = {  # besides all layers, which tuned copy has, and :3, which tuned distillation has
    **{f"copy, layers {which}": copied(layers=which) for which in (*WHICH, ":3")},
    **{f"distillation, layers {which}": distilled(layers=which) for which in (*WHICH, "all")},
}
EXPLAINED = {
    "distillation, detached": distilled(detach=True),
    "distillation without labels": distilled(class_weight=0.0, layers="all"),
    "linear probe of that": probed("distillation without labels"),
    "linear probe of a random net": probed("none"),
}
AGAIN = {  # in another order, from another start, on the same labels: for ensembles
    f"{row} again": MAIN[row]._replace(tuned_as=row)
    for row in ("from scratch", "attention distillation", "fine-tuning")
}
SINGLE = {f"copy, layer {i}": copied(layers=str(i)) for i in range(4)}
LABELLED = {"classes": ":5", "num_labels": 0, "epochs": 13, "lr": 2e-3}
KNOWING = {  # teachers that scenes may have, besides the one without labels
    "a teacher with labels": Row("finetune", "none", LABELLED),
    "an MAE": Row("pretrain", "", {"target": "masked", "num_labels": 0, "epochs": 39}),
}
WHOSE = {
    f"{row}, {teacher}": Row(script, teacher, flags, tuned_as=row)
    for teacher in KNOWING
    for row, script, flags in (
        ("attention copy", "copy", {}), ("copy, mean maps", "variants", {"maps": "mean"}),
        ("attention distillation", "distill", {}), ("fine-tuning", "finetune", {}),
    )
}  # fmt: skip
ELSEWHERE = "fine-tuned on other classes"
OTHERS = {ELSEWHERE: Row("finetune", "pre-trained", {"classes": ":5"}, "fine-tuning")}
FINE_TUNED = {
    "copy, fine-tuned teacher": CONTROLS["copy, fine-tuned teacher"],
    "copy, its mean maps": Row("variants", "fine-tuning", {"maps": "mean"}, "copy, mean maps"),
    f"copy, {ELSEWHERE}": Row("copy", ELSEWHERE, {}, "attention copy"),
    f"copy, {ELSEWHERE}, mean": Row("variants", ELSEWHERE, {"maps": "mean"}, "copy, mean maps"),
}
MISMATCHED = {  # without the components that the teacher has
    "from scratch, plain": Row("finetune", "none", {"model": "micro"}, tuned_as="from scratch"),
    "copy, plain student": copied(student="plain"),
    "distillation, plain student": distilled(student="plain"),
}
ROWS = MAIN | PROBE | BASELINES | CONTROLS | LADDER | PARTS | LAYERS | SINGLE | EXPLAINED | AGAIN
ROWS |= MISMATCHED | KNOWING | WHOSE | OTHERS | FINE_TUNED
