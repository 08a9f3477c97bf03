"""The related systems: rows, each a script of theirs with one thing changed, and their tables."""

from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
from common import checkpoints
from study.engine import Runs, Study, Table, estimate_correct, read_correct, subtract
from study.engine import estimate_accuracies as estimate
from study.estimates import estimate_over_seeds
from study.jobs import Job, load
from study.rows import AT_BASE, Row

# The rows
UNTRAINED = {"epochs": 1, "warmup": 0, "blr": 0.0}
WIDE, LONG, OTHER = "a wider net", "4 times as long", "of other images"
FOUR = {"4 distractors": {"distractors": 4}}  # with one, small nets have nothing to gain
alone, helped = (partial(Row, "activations", teacher) for teacher in ("", WIDE))
CHEAP = {"model": "bottleneck"}
ACTIVATIONS = {
    WIDE: alone({"model": "teacher"}),
    "thin": alone({"at_weight": 0.0}),
    f"thin, {LONG}": alone({"at_weight": 0.0, "epochs": 160}),
    "thin, KD": helped({"at_weight": 0.0, "kd_weight": 0.9}),
    "thin, AT": helped(),
    "bottleneck": alone(CHEAP | {"at_weight": 0.0}),
    f"bottleneck, {LONG}": alone(CHEAP | {"at_weight": 0.0, "epochs": 160}),
    "bottleneck, AT": helped(CHEAP | {"at_weight": 140.0}),
}
overlay = partial(Row, "integrated_gradients", WIDE)
GRADIENTS = {
    "neither": overlay({"overlay": 0.0}),
    "IG": overlay(),
    f"IG {OTHER}": overlay({"shuffle": True}),
    "KD": overlay({"overlay": 0.0, "kd_weight": 0.3}),
    "KD and IG": overlay({"kd_weight": 0.3}),
    f"KD and IG {OTHER}": overlay({"kd_weight": 0.3, "shuffle": True}),
    "KD, AT, IG: the authors'": overlay({"kd_weight": 0.01, "at_weight": 0.8, "raw": True}),
}
SOFTMAX, TAUGHT = "softmax", "linear, transfer"
LORA, AFTER = ({n: f"{how}, {n} epochs" for n in (2, 6, 20, 60)} for how in ("LoRA", "both"))
LINEAR = {
    SOFTMAX: Row("finetune", "pre-trained"),
    "linear, untaught": Row("linear_attention", SOFTMAX, UNTRAINED),
    TAUGHT: Row("linear_attention", SOFTMAX),
    **{LORA[n]: Row("linear_attention", SOFTMAX, {"lora": True, "epochs": n}) for n in LORA},
    **{AFTER[n]: Row("linear_attention", TAUGHT, {"lora": True, "epochs": n}) for n in AFTER},
}
LABELLED, RANDOM = "labels, teacher", "random, teacher"
ATTNDISTILL = {
    RANDOM: Row("attndistill", "none", {"model": "micro"} | UNTRAINED),
    LABELLED: Row("attndistill", "none", {"model": "micro"}),
    "random, student": Row("attndistill", "none", UNTRAINED),
    "token": Row("attndistill", LABELLED, {"attention_weight": 0.0}),
    "token and map": Row("attndistill", LABELLED),
    "token and map, weight 1": Row("attndistill", LABELLED, {"attention_weight": 1.0}),
}
ALONE, BESIDE, LOOK = "the robot alone", "words, a map beside", "words to attention"
UNTAUGHT = f"{LOOK}, its map untaught"
REMINDED = {
    ALONE: Row("reminders", "", {"reminder": "none"}),
    f"{ALONE} again": Row("reminders", "", {"reminder": "none"}),  # how often errs another?
    "words": Row("reminders", "", {"reminder": "words"}),
    BESIDE: Row("reminders", "", {"reminder": "beside"}),  # learned, and not used
    LOOK: Row("reminders", ""),
    UNTAUGHT: Row("reminders", "", {"attention_weight": 0.0}),
}
STUDY = Study(ACTIVATIONS | GRADIENTS | LINEAR | ATTNDISTILL | REMINDED, {"data": "digits"})
RATED = STUDY._replace(base=dict(STUDY.base), seeds=(100, 101), decays=(0.0,),
    rates=(3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1),
    own=dict.fromkeys((*LORA.values(), *AFTER.values()), ("rank", (8,))))  # fmt: skip


def rebuild(job: Job):
    """The task of a finished run, untrained."""
    settings = job.get_settings()
    return load(job.script).task(settings, data.load(settings))


def find_sizes(table: Table, runs: Runs) -> dict:
    """Accuracies; and for each row its parameters, and the multiply-adds of an image."""
    found = estimate(table, runs)
    (of_rows,), (cells,) = runs.values(), found["points"].values()
    for row, (job, *_) in of_rows.items():
        task = rebuild(job)
        image, _ = next(task.data.test.in_order(1))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            task.predict(task.net.eval(), image)
        cells[row]["parameters"] = sum(p.numel() for p in task.net.parameters())
        cells[row]["multiply-adds"] = counter.get_total_flops() // 2
    return found


def find_trained(table: Table, runs: Runs) -> dict:
    """Accuracies; and how many parameters each row trained, besides those of the ViT."""
    found, what = estimate(table, runs), "trained parameters"
    (of_rows,), (cells,) = runs.values(), found["points"].values()
    for row, (job, *_) in of_rows.items():
        of_row, cells[row][what] = STUDY.rows[row], 0
        if row != SOFTMAX and "blr" not in of_row.flags:  # which is a rate of 0
            net = rebuild(job).net
            own = sum(p.numel() for p in net.parameters() if p.requires_grad)
            cells[row][what] = own + cells[of_row.teacher][what]
    return found


def find_reminded(table: Table, runs: Runs) -> dict:
    """Accuracies, the first row's failures that are avoided, and where attention lands."""
    ((point, of_rows),) = runs.items()
    correct = read_correct(of_rows)
    found = estimate_correct({point: correct}, table.against)
    avoided = {}
    for row, cells in found["points"][point].items():
        pairs = zip(correct[row], correct[ALONE], strict=True)
        avoided[row] = np.array([now[~before].mean() for now, before in pairs])
        cells["failures avoided"] = estimate_over_seeds(100 * avoided[row])
        tests = [checkpoints.read_file(job.out / "test.pt") for job in of_rows[row]]
        if all("looked" in test for test in tests):
            lands = 100 * np.stack([(t["looked"] == t["labels"]).numpy() for t in tests])
            cells["attention lands right"] = estimate_over_seeds(lands.mean(axis=1))
    for row, other in ((LOOK, "words"), (LOOK, BESIDE), (BESIDE, "words"), (LOOK, UNTAUGHT)):
        paired = estimate_over_seeds(100 * (avoided[row] - avoided[other]))
        found["contrasts"][f"failures avoided: {row} − {other}"] = paired
    return found


# The tables
related = partial(Table, study=STUDY, points=AT_BASE, seeds=5, first=1)  # 0 was used while writing
TABLES = {
    "related-activations": related("where a CNN is active, and its softened classes, given to "
        "smaller ones", rows=tuple(ACTIVATIONS), find=find_sizes, points=FOUR,
        against={row: row.split(",")[0] if "," in row else WIDE for row in ACTIVATIONS},
        contrasts=subtract(*((f"{net}, AT", f"{net}, {LONG}") for net in ("thin", "bottleneck")),
                           ("thin, AT", "thin, KD"))),
    "related-gradients": related("what contributed to a teacher's class, laid over digits",
        rows=tuple(GRADIENTS), seeds=20, first=6, points=FOUR,  # rounding alone moves these nets
        against={row: "KD" if "KD and" in row else "neither" for row in GRADIENTS},
        contrasts=subtract(("IG", f"IG {OTHER}"), ("KD and IG", f"KD and IG {OTHER}"),
                           ("KD and IG", "neither"))),
    "related-linear-tuning": related("rates of LoRA", study=RATED, tunes=True, rows=(*RATED.own,)),
    "related-linear": related("softmax attention made linear", study=RATED, rows=tuple(LINEAR),
        find=find_trained, against=dict.fromkeys(LINEAR, SOFTMAX),
        contrasts=subtract(*((AFTER[n], LORA[n]) for n in LORA), (AFTER[60], TAUGHT))),
    "related-attndistill": related("students without labels: class tokens and where they look; 20 "
        "nearest neighbours", rows=tuple(ATTNDISTILL),
        against={LABELLED: RANDOM, "token": "random, student"}
        | dict.fromkeys(("token and map", "token and map, weight 1"), "token"),
        contrasts=subtract(("token", LABELLED))),
    "related-reminders": related("reminders in words, to where a robot looks", points={"": {}},
        rows=tuple(REMINDED), find=find_reminded, against=dict.fromkeys(REMINDED, ALONE)),
}  # fmt: skip
