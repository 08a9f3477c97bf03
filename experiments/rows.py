"""The rows of the study, and their runs: which script, which teacher, what is tuned of it."""

from pathlib import Path
from typing import Any, NamedTuple

import teachers
from experiments.jobs import SCRIPTS, Job
from settings import to_argv

Flags = dict[str, Any]  # settings by name


class Row(NamedTuple):
    script: str  # of jobs.SCRIPTS
    teacher: str  # none, random, pre-trained, the row whose net it is, or "" for no such setting
    flags: Flags | None = None  # what makes it this row
    tuned_as: str = ""  # the row whose settings it takes where it is not tuned itself


MAIN = {
    "from scratch": Row("finetune", "none"),
    "attention copy": Row("copy", "pre-trained"),
    "attention distillation": Row("distill", "pre-trained"),
    "fine-tuning": Row("finetune", "pre-trained"),
}
PROBE = {"linear probe of the teacher": Row("variants", "pre-trained", {"how": "probe"})}
BASELINES = {
    "feature distillation": Row("variants", "pre-trained", {"how": "features"}),
    "logit distillation": Row("variants", "fine-tuning", {"how": "logits"}),
}
CONTROLS = {
    "copy, random teacher": Row("copy", "random", tuned_as="attention copy"),
    "distillation, random teacher": Row("distill", "random", tuned_as="attention distillation"),
    "copy, fine-tuned teacher": Row("copy", "fine-tuning", tuned_as="attention copy"),
    "teacher's maps and weights": Row(
        "variants",
        "pre-trained",
        {"start": "teacher", "layer_decay": 0.75},
        tuned_as="attention copy",
    ),
}


def copied(**flags) -> Row:
    return Row("variants", "pre-trained", flags, tuned_as="attention copy")


def distilled(**flags) -> Row:
    flags = {"how": "distill"} | flags
    return Row("variants", "pre-trained", flags, tuned_as="attention distillation")


MAPS = ("uniform", "impulse", "mean", "other")
LADDER = {
    **{f"copy, {maps} maps": copied(maps=maps) for maps in MAPS},
    **{f"distillation, {maps} maps": distilled(maps=maps) for maps in MAPS},
    "distillation, fine-tuned teacher": Row(
        "distill", "fine-tuning", tuned_as="attention distillation"
    ),
}
PARTS = {f"copy of {part}": copied(lend=part) for part in ("q", "k", "v", "qkv")}
WHICH = ("1", "2", "1-3", "2-3", "3-3")
LAYERS = {  # beside all, which copy has when tuned, and three, which distillation has
    **{f"copy, layers {which}": copied(layers=which) for which in (*WHICH, "3")},
    **{f"distillation, layers {which}": distilled(layers=which) for which in (*WHICH, "all")},
}
EXPLAINED = {
    "distillation, detached": distilled(detach=True),
    "distillation without labels": distilled(class_weight=0.0, layers="all"),
    "linear probe of that": Row(
        "variants", "distillation without labels", flags={"how": "probe"},
        tuned_as="linear probe of the teacher",
    ),
    "linear probe of a random net": Row(
        "variants", "none", flags={"how": "probe"}, tuned_as="linear probe of the teacher"
    ),
}  # fmt: skip
AGAIN = {  # in another order, from another start, on the same labels: for ensembles
    f"{row} again": MAIN[row]._replace(tuned_as=row)
    for row in ("from scratch", "attention distillation", "fine-tuning")
}
PLAIN = {"student": "plain"}
MISMATCHED = {  # without the components that the teacher has
    "from scratch, plain": Row("finetune", "none", {"components": ""}, tuned_as="from scratch"),
    "copy, plain student": Row("copy", "pre-trained", PLAIN, tuned_as="attention copy"),
    "distillation, plain student": Row(
        "distill", "pre-trained", PLAIN, tuned_as="attention distillation"
    ),
}
NEAREST = "1-nearest neighbour of pixels"  # no run at all
ROWS = (
    MAIN | PROBE | BASELINES | CONTROLS | LADDER | PARTS | LAYERS | EXPLAINED | AGAIN | MISMATCHED
)


class Study(NamedTuple):
    """A data set: its rows, what all of them share, and what is tuned of each."""

    rows: dict[str, Row]
    base: Flags  # of all of them, where a point does not say otherwise
    teacher: Flags
    images: tuple[str, ...]  # settings that the teacher shares
    own_teachers: bool  # one for each seed; or one for all, which is shipped once it is made
    seeds: tuple[int, ...]  # of tuning, which no table uses
    rates: tuple[float, ...]  # that are tried for every row,
    decays: tuple[float, ...]  # weight decays,
    own: dict[str, tuple[str, tuple]]  # and one setting of the row's own, its usual value first


class Runs(NamedTuple):
    """Where the runs of a study are, and how they are made."""

    study: Study
    folder: Path
    extra: tuple[str, ...] = ()

    def jobs(self, row: str, seed: int, point: Flags, tuned: dict[str, Flags]) -> dict[str, Job]:
        """A run, last, behind those whose nets it needs, by name. `tuned`: of each row."""
        study, (script, source, flags, tuned_as) = self.study, self.study.rows[row]
        needed, teacher = {}, source
        if source == "pre-trained":
            needed = self.pretraining(seed, point)
            (made,) = needed.values()
            if not study.own_teachers and (file := teachers.shipped(made.settings())):
                needed, teacher = {}, file
        elif source in study.rows:
            needed = self.jobs(source, seed, point, tuned)
        after = list(needed)[-1:]
        if after:
            teacher = needed[after[0]].out / "model.pt"
        own = tuned[row if row in study.own else tuned_as] if study.own else {}
        own = own | (flags or {})
        given = study.base | point | own | {"seed": seed}
        given |= {"teacher": teacher} if teacher else {}
        if "epochs" in given and "eval_every" in SCRIPTS[script].SETTINGS:
            given["eval_every"] = given["epochs"]
        if row.endswith(" again"):
            given |= {"seed": seed + 1000, "subset_seed": seed}
        special = {k: v for k, v in (point | own).items() if study.base.get(k) != v}
        name = f"{row}{described(special)} s{seed}"
        return needed | {name: self.job(script, name, given, tuple(after))}

    def pretraining(self, seed: int, point: Flags) -> dict[str, Job]:
        study, seed = self.study, seed if self.study.own_teachers else 0
        which = {k: v for k, v in point.items() if k in study.images}
        shared = {k: v for k, v in (study.base | point).items() if k in study.images}
        name = f"teacher{described(which)} s{seed}"
        return {name: self.job("pretrain", name, shared | study.teacher | {"seed": seed})}

    def job(self, script: str, name: str, given: Flags, after: tuple[str, ...] = ()) -> Job:
        out = self.folder / name
        return Job(script, [*to_argv(given | {"out": out}), *self.extra], out, after)


def described(flags: Flags) -> str:
    return "".join(f", {name} {value}" for name, value in flags.items())
