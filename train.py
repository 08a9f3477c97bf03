"""The one training loop: a Task in, a row of results out. It knows no method.

Copy, distillation and fine-tuning can be compared because everything else is literally the same
code. One process or many (`torchrun`), CPU, CUDA or MPS, float32 or mixed precision; a run killed
at any moment goes on with --resume.

A run leaves in --out: config.json (its settings), log.jsonl (a row per epoch), last.pt (to resume)
and model.pt (to share).
"""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import checkpoints
from data import Data, Eval
from launch import Failed, print0, rank, world
from learner import Learner, autocast, learning_rate
from progress import Clock, progress_line, report
from settings import Settings


@dataclass
class Task:
    """What a method is, for the loop.

    loss(net, images, labels) -> (terms, diagnostics)   the loop minimises the sum of the terms
    predict(net, images)      -> logits                 for evaluation (None: there is none)
    export(net)               -> dict                   what model.pt holds of the net
    """

    name: str
    net: nn.Module
    data: Data
    loss: Callable[[nn.Module, Tensor, Tensor], tuple[dict[str, Tensor], dict[str, Tensor]]]
    predict: Callable[[nn.Module, Tensor], Tensor] | None
    export: Callable[[nn.Module], dict] = checkpoints.export


def fit(task: Task, settings: Settings) -> dict:
    """Trains the task's net. Returns the last row of its log, with `test_top1` if it can predict.

    With --ema, model.pt gets the average of the weights, and the accuracy reported is the
    average's. Failed if the loss stops being finite.
    """
    per_epoch = steps_per_epoch(task, settings)
    steps, warmup = settings.epochs * per_epoch, settings.warmup * per_epoch
    out, state = checkpoints.open_run(settings, task.name)
    learner, rows, seconds = Learner(task.net, task.loss, settings, steps), [], 0.0
    if state:
        rows, seconds = take_up(learner, state, steps, per_epoch, out)
    clock = Clock(learner.done, steps, settings.batch, seconds)
    write_log(out, settings, task, rows)

    task.net.train()
    with interrupted() as signals:
        for epoch in range(learner.done // per_epoch, settings.epochs):
            for images, labels in task.data.train.epoch(epoch, start=learner.done % per_epoch):
                rate = learning_rate(learner.done, steps, warmup, settings.lr, settings.min_lr)
                learner.learn(images, labels, rate)
                if clock.a_second_passed():
                    check_finite(learner, out)
                    progress_line(learner, per_epoch, clock)
                ends_epoch = learner.done % per_epoch == 0
                if not ends_epoch and (signals or clock.unsaved() > settings.save_every):
                    save_state(out, learner, rows, settings, clock, signals)

            gather(learner)
            check_finite(learner, out)
            row = {"epoch": epoch + 1} | means(learner, per_epoch) | {"lr": rate}
            row |= clock.row(learner.done)
            if task.predict and validation_due(epoch, settings):
                with clock.evaluating():
                    row |= validate(task, learner, settings)
            rows.append(row)
            learner.terms, learner.diagnostics = {}, {}
            report(row, settings.epochs, clock.left(learner.done))
            save_state(out, learner, rows, settings, clock, signals)
            append_log(out, row)

    return finish(task, learner, rows, settings, out)


def steps_per_epoch(task: Task, settings: Settings) -> int:
    """Batches of an epoch. ValueError if batch, ranks, images and warm-up do not go together."""
    if settings.batch % world():
        raise ValueError(
            f"--batch {settings.batch} does not divide by the {world()} processes: choose a "
            "multiple"
        )
    images = len(task.data.train)
    if settings.batch > images:
        raise ValueError(f"--batch {settings.batch} is more than the {images} training images")
    if settings.warmup >= settings.epochs:
        raise ValueError(
            f"--warmup {settings.warmup}: must be less than --epochs {settings.epochs}"
        )
    return images // settings.batch


def take_up(learner: Learner, state: dict, steps: int, per_epoch: int, out: Path):
    """Goes on from a saved state: the rows of the log, and the seconds, so far."""
    try:
        learner.restore(state)
        rows, seconds = list(state["rows"]), float(state["seconds"])
        if not 0 <= learner.done <= steps or len(rows) != learner.done // per_epoch:
            raise ValueError(f"{learner.done} of {steps} steps and {len(rows)} epochs")
    except Exception as error:  # whatever a file of another run, or a damaged one, leads to
        reason = str(error)[:80]
        raise ValueError(
            f"cannot go on from {out / 'last.pt'}, which does not fit this run "
            f"({type(error).__name__}: {reason}): start over with --overwrite"
        ) from error
    print0(f"{out}: going on from step {learner.done} of {steps}")
    return rows, seconds


def finish(task: Task, learner: Learner, rows: list[dict], settings: Settings, out: Path) -> dict:
    """Tests what was trained, and writes model.pt."""
    shared, result = learner.average or task.net, dict(rows[-1])
    if task.predict:
        top1 = result["val_top1_ema" if learner.average else "val_top1"]
        if task.data.test is not task.data.val:
            top1 = accuracy(task.predict, shared, task.data.test, settings)
        result["test_top1"] = top1
        print0(f"test top-1 {top1:.2f} %  ({out / 'model.pt'})")
    else:
        print0(f"wrote {out / 'model.pt'}")
    if rank() == 0:
        write_rows(out, [*rows[:-1], result])
        data = {"classes": task.data.classes, "normalization": task.data.normalization}
        checkpoints.save(task.export(shared) | data | {"method": task.name}, out / "model.pt")
    if dist.is_initialized():
        dist.barrier()
    return result


# Evaluation ---------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(predict: Callable, net: nn.Module, images: Eval, settings: Settings) -> float:
    """Top-1 in per cent, exact over all ranks: each counts its own images, none twice."""
    was_training = net.training
    net.eval()
    where = next(net.parameters()).device
    mixed = autocast(settings.amp, net)
    counts = torch.zeros(2, dtype=torch.long, device=where)  # correct, all
    for batch, labels in images.in_order(settings.micro_batch or 256):
        with mixed:
            correct = predict(net, batch).argmax(dim=-1) == labels
        counts += torch.stack([correct.sum(), torch.tensor(len(correct), device=where)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    net.train(was_training)
    correct, count = counts.tolist()
    return 100 * correct / max(1, count)


def validation_due(epoch: int, settings: Settings) -> bool:
    return (epoch + 1) % settings.eval_every == 0 or epoch + 1 == settings.epochs


def validate(task: Task, learner: Learner, settings: Settings) -> dict[str, float]:
    row = {"val_top1": accuracy(task.predict, task.net, task.data.val, settings)}
    if learner.average:
        row["val_top1_ema"] = accuracy(task.predict, learner.average, task.data.val, settings)
    return row


# What a run says and saves ------------------------------------------------------------------------


def gather(learner: Learner) -> None:
    """Replaces the sums of this process by their means over all."""
    if dist.is_initialized():
        for value in (*learner.terms.values(), *learner.diagnostics.values()):
            dist.all_reduce(value.div_(world()))


def means(learner: Learner, steps: int) -> dict[str, float]:
    return {k: (v / steps).item() for k, v in (learner.terms | learner.diagnostics).items()}


def check_finite(learner: Learner, out: Path) -> None:
    for name, value in (learner.terms | learner.diagnostics).items():
        if not torch.isfinite(value):
            last = out / "last.pt"
            raise Failed(
                f"{name} is no longer finite at step {learner.done}: "
                "try a lower --lr, a longer --warmup or --amp off"
                + (f"; the last good checkpoint is {last}" if last.exists() else "")
            )


def save_state(
    out: Path, learner: Learner, rows: list, settings: Settings, clock: Clock, signals: list
) -> None:
    """Writes last.pt, and leaves if a signal asked for it."""
    check_finite(learner, out)
    if rank() == 0:
        about = dict(settings=vars(settings), rows=rows, seconds=clock.before + clock.elapsed())
        checkpoints.save(learner.state() | about, out / "last.pt")
    clock.saved = time.perf_counter()
    if signals:
        print0(
            f"\nstopped by a signal at step {learner.done}; --resume goes on from {out / 'last.pt'}"
        )
        sys.exit(128 + signals[0])


@contextlib.contextmanager
def interrupted():
    """A list that fills when SIGTERM or Ctrl-C arrives, for the loop to save and leave.

    Of many processes only the first decides: the others would leave at other steps, and it could
    not save its own.
    """
    signals: list[int] = []

    def receive(number: int, _) -> None:
        if rank() == 0:
            signals.append(number)

    handlers = {}
    with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
        for number in (signal.SIGTERM, signal.SIGINT):
            handlers[number] = signal.signal(number, receive)
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def write_log(out: Path, settings: Settings, task: Task, rows: list[dict]) -> None:
    """config.json, and log.jsonl as far as the run has come."""
    if rank() == 0:
        where = str(next(task.net.parameters()).device)
        about = {"torch": torch.__version__, "on": where, "commit": checkpoints.commit()}
        checkpoints.write_text(out / "config.json", json.dumps(vars(settings) | about, indent=1))
        write_rows(out, rows)


def write_rows(out: Path, rows: list[dict]) -> None:
    checkpoints.write_text(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def append_log(out: Path, row: dict) -> None:
    if rank() == 0:
        with open(out / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
