"""What a study is made of: its rows, their runs, its tables, and the accuracies of a table."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.runs import hash_settings
from common.settings import get_values
from study.estimates import compute_share, estimate, pack
from study.jobs import ROOT, Job, to_argv
from study.rows import NOTHING, Flags, Row
from teachers.bundled import find_bundled

Runs = dict[str, dict[str, list[Job]]]  # point: row: its runs, one for each seed


class Study(NamedTuple):  # a data set: its rows, what they share, what is tuned of each
    rows: dict[str, Row]
    base: Flags  # of all rows, unless a point overrides it
    teacher: Flags = NOTHING
    images: tuple[str, ...] = ("data", "distractors", "model")  # settings the teacher shares
    teacher_seed: int | None = None  # of one for all (0: the bundled one if it fits)
    published: str = ""  # or the name of a public one
    seeds: tuple[int, ...] = ()  # of tuning, which no table uses
    rates: tuple[float, ...] = ()  # tried for every row,
    decays: tuple[float, ...] = ()  # weight decays,
    joint: tuple[float, ...] = ()  # those of them that are tried with every rate
    mixes: tuple[Flags, ...] = ()  # ways to regularise,
    own: Mapping[str, tuple[str, tuple]] = NOTHING  # one more: its default first


class Planner(NamedTuple):  # plans the runs of a study
    study: Study
    folder: Path
    extra: tuple[str, ...] = ()

    def plan(self, row: str, seed: int, point: Flags, tuned: dict[str, Flags]) -> dict[str, Job]:
        """Jobs by name: those whose nets a run needs, then the run. `tuned`: settings of rows.

        ValueError unless they are known, in a study that tunes any.
        """
        study, (script, source, flags, tuned_as, apart) = self.study, self.study.rows[row]
        needed, teacher = {}, source
        if source == "pre-trained" and study.published:
            teacher = study.published
        elif source == "pre-trained":
            needed = self.plan_teacher(seed, point)
            (job,) = needed.values()
            if study.teacher_seed == 0 and (file := find_bundled(job.get_settings())):
                needed, teacher = {}, file
        elif source in study.rows:
            needed = self.plan(source, seed + apart, point, tuned)
        if needed:
            teacher = list(needed.values())[-1].out / "model.pt"
        tuned_as = row if row in study.own else tuned_as
        if study.own and tuned_as and tuned_as not in tuned:
            remedy = "first reproduce the tuning of its table (--help lists them)"
            raise ValueError(f"'{tuned_as}' has no settings yet: {remedy}")
        own = (tuned[tuned_as] if study.own and tuned_as else {}) | flags
        shared = self.pick_images(point) if script == "pretrain" else study.base | point
        given = shared | own | {"seed": seed} | ({"teacher": teacher} if teacher else {})
        if "epochs" in given:
            given["eval_every"] = given["epochs"]
        if "lr" in given:
            given["blr"] = 0.0  # of no use, and no reason to run again when a recipe changes
        special = {k: v for k, v in (point | own).items() if study.base.get(k) != v}
        name = f"{row}{format_flags(special)} s{seed}"
        return needed | {name: self.make_job(script, name, given, tuple(needed))}

    def pick_images(self, point: Flags) -> Flags:  # all that a teacher shares with its students
        return {k: v for k, v in (self.study.base | point).items() if k in self.study.images}

    def plan_teacher(self, seed: int, point: Flags) -> dict[str, Job]:
        study, one = self.study, self.study.teacher_seed
        seed = seed if one is None else one
        which = {k: v for k, v in point.items() if k in study.images}
        shared = self.pick_images(point)
        name = f"teacher{format_flags(which)} s{seed}"
        return {name: self.make_job("pretrain", name, shared | study.teacher | {"seed": seed})}

    def make_job(self, script: str, name: str, given: Flags, after: tuple[str, ...] = ()) -> Job:
        settings = Job(script, [*to_argv(given), *self.extra], self.folder).get_settings()
        counts = get_values(settings, free=False).keys() | {"teacher"} & given.keys()
        shown = {k: str(getattr(settings, k)).removeprefix(f"{ROOT}/") for k in sorted(counts)}
        out = self.folder / f"{name} {hash_settings(shown)}".replace(":", "-")
        return Job(script, [*to_argv(given | {"out": out}), *self.extra], out, after)


def format_flags(flags: Flags) -> str:
    return "".join(f", {name} {value}" for name, value in flags.items())


class Table(NamedTuple):  # rows at points of a study
    about: str
    study: Study
    rows: tuple[str, ...]
    points: dict[str, Flags]
    seeds: int = 10
    first: int = 0  # of the seeds
    tunes: bool = False  # finds settings on validation images, and tests nothing
    tuned_at: tuple[str, ...] = ()  # points whose settings others take, unless they have their own
    against: dict[str, str] | None = None  # what a row is compared with, if not BASELINE
    fewer: Mapping[str, tuple] = NOTHING  # rows, seeds of a point
    find: Callable[["Table", Runs], dict] | None = None  # something else than accuracies
    contrasts: Mapping[str, Callable[..., float]] = NOTHING  # by their names


def estimate_accuracies(table: Table, runs: Runs) -> dict:
    """Estimates of the rows at each point, contrasts across points, and which images were right."""
    correct = {point: read_correct(of_rows) for point, of_rows in runs.items()}
    return estimate_correct(correct, table.against, table.contrasts)


def estimate_correct(correct: dict[str, dict], against=None, contrasts=NOTHING):
    """The same of whether each image was classified correctly: (seeds, images) of each row."""
    values, packed = ({point: {} for point in correct} for _ in range(2))
    for point, of_rows in correct.items():
        for row, right in of_rows.items():
            values[point][row], packed[point][row] = 100 * right.mean(axis=1), pack(right)
    return estimate(values, against, contrasts) | {"images": right.shape[1], "correct": packed}


def read_correct(of_rows: dict[str, list[Job]]) -> dict[str, np.ndarray]:
    """Whether each row classified each test image correctly, (seeds, images)."""
    return {row: np.stack([job.read_correct() for job in jobs]) for row, jobs in of_rows.items()}


def subtract(*pairs: tuple[str, str], points: Iterable[str] = ("",)) -> dict[str, Callable]:
    def compute(*of, at, row, other):
        return of[at][row] - of[at][other]

    return {
        f"{row} − {other}{point and f', {point}'}": partial(compute, at=at, row=row, other=other)
        for row, other in pairs for at, point in enumerate(points)
    }  # fmt: skip


def share_of_gain(row: str, other: str) -> dict[str, Callable]:
    name = f"share of the gain of {other} that {row} has"
    return {name: lambda of, *_: compute_share(of, row, other)}  # at the first point
