"""The rows of the study: which script each runs, with which teacher, and what is tuned of it."""

import launch

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.jobs import Job
from settings import to_argv

Flags = dict[str, Any]  # settings by name


class Row(NamedTuple):
    script: str  # of jobs.SCRIPTS
    teacher: str  # none, random, pre-trained, or the row whose net it is
    own: tuple[str, tuple]  # the one setting of its own that is tuned: the usual value first
    flags: Flags = {}  # what makes it this row


LAYERS = ("layers", ("all", "3", "2"))
MAIN = {
    "from scratch": Row("finetune", "none", ("drop_path", (0.0, 0.1, 0.2))),
    "attention copy": Row("copy", "pre-trained", LAYERS),
    "attention distillation": Row("distill", "pre-trained", ("layers", ("3", "all", "2"))),
    "fine-tuning": Row("finetune", "pre-trained", ("layer_decay", (0.75, 1.0, 0.5))),
}
ROWS = MAIN


class Study(NamedTuple):
    """A data set, what all its rows share, and where the runs are."""

    base: Flags
    teacher: Flags
    images: tuple[str, ...]  # what of a point the teacher shares
    own_teachers: bool  # one for each seed, or one for all
    runs: Path
    extra: list[str] = []

    def jobs(
        self, row: str, seeds: Iterable[int], point: Flags, tuned: Flags
    ) -> dict[str, Job]:
        """The runs of a row at a point of the study, and those that they need, by name."""
        made = {}
        for seed in seeds:
            made |= self.job(row, seed, point, tuned)
        return made

    def job(self, row: str, seed: int, point: Flags, tuned: Flags) -> dict[str, Job]:
        script, source, _, flags = ROWS[row]
        needed, teacher = {}, source
        if source == "pre-trained":
            needed = self.pretraining(seed, point)
        elif source in ROWS:
            needed = self.job(source, seed, point, tuned)
        after = list(needed)[-1:]
        if after:
            teacher = self.folder(after[0]) / "model.pt"
        asked = self.base | flags | point | tuned
        name = f"{row}{described(point | tuned)} s{seed}"
        given = asked | {"eval_every": asked["epochs"], "teacher": teacher, "seed": seed}
        return needed | {name: self.made(script, name, given, tuple(after))}

    def pretraining(self, seed: int, point: Flags) -> dict[str, Job]:
        seed = seed if self.own_teachers else 0
        shared = {k: v for k, v in (self.base | point).items() if k in self.images}
        which = {k: v for k, v in point.items() if k in self.images}
        name = f"teacher{described(which)} s{seed}"
        return {name: self.made("pretrain", name, shared | self.teacher | {"seed": seed})}

    def made(self, script: str, name: str, given: Flags, after: tuple[str, ...] = ()) -> Job:
        out = self.folder(name)
        return Job(script, [*to_argv(given | {"out": out}), *self.extra], out, after)

    def folder(self, name: str) -> Path:
        return self.runs / self.base["data"] / name


def described(flags: Flags) -> str:
    return "".join(f", {name} {value}" for name, value in flags.items())
