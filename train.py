"""The one training loop: a Task in, a row of results out. It knows no method.

Copy, distillation and fine-tuning can be compared because everything else is literally the same
code. One process or many (`torchrun`), CPU, CUDA or MPS, float32 or mixed precision; a run killed
at any moment goes on with --resume. What it leaves in --out: runs.py.
"""

from launch import Failed, first_to_fail, from_all, print0, rank, world

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import checkpoints
import pictures
import runs
import storage
from data import Data, Eval
from learner import Learner, autocast, learning_rate, scaled_rates
from progress import Clock, conclude, introduce, progress_line, report
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
    predict: Callable[[nn.Module, Tensor], Tensor] | None = None
    export: Callable[[nn.Module], dict] = checkpoints.export
    teacher: checkpoints.Checkpoint | None = None  # it learns from: part of what the run is
    later: tuple[int, Callable] | None = None  # after these epochs, another loss
    # Without predict: test(net) -> {"predicted", "labels", ...}, each (images,), at the end.
    test: Callable[[nn.Module], dict[str, Tensor]] | None = None


def fit(task: Task, settings: Settings) -> dict:
    """Trains the task's net. Returns the last row of its log, with `test_top1` if it can predict.

    With --ema, model.pt gets the average of the weights, and the accuracy reported is the
    average's. Failed if the loss stops being finite.
    """
    runs.check(settings, task.name)  # again: not all who call this did
    with runs.locked(runs.folder(settings, task.name)) as out:
        return train(task, settings, out)


def train(task: Task, settings: Settings, out: Path) -> dict:
    train_set, size = task.data.train, task.data.image_size
    per_epoch = len(train_set) // train_set.batch
    steps, warmup = settings.epochs * per_epoch, round(settings.warmup * per_epoch)
    peak, floor = scaled_rates(settings, train_set.batch)
    run = runs.identity(task.name, task.data, task.teacher, settings)
    state = runs.begin(out, settings, run)
    learner, rows, seconds = Learner(task.net, task.loss, settings, steps), [], 0.0
    predicted = None  # classes of the validation images, latest, and their labels
    task.net.train()
    learner.find_micro_batch(train_set.batch // world(), (task.data.channels, size, size))
    introduce(task, learner, out, peak)
    if resumed := bool(state):
        rows, seconds = take_up(learner, state, steps, per_epoch, out)
    del state  # gigabytes, of a large net
    check_agreement(learner)
    clock = Clock(learner.done, steps, train_set.batch, seconds)
    if not resumed:  # only now, when nothing is refused any more
        runs.clear(out)
    runs.describe(out, run, settings, learner.device)
    runs.write_rows(out, rows)

    with interrupted() as signals:
        for epoch in range(learner.done // per_epoch, settings.epochs):
            if task.later and epoch >= task.later[0]:
                learner.turn_to(task.later[1])
            for batch in train_set.epoch(epoch, start=learner.done % per_epoch):
                rate = learning_rate(learner.done, steps, warmup, peak, floor)
                learner.learn(*batch, rate)
                if clock.a_second_passed():
                    check_finite(learner, out)
                    progress_line(learner, per_epoch, clock)
                ends_epoch = learner.done % per_epoch == 0
                if not ends_epoch and (signals or clock.unsaved() > settings.save_every):
                    save_state(out, learner, rows, run, clock, signals)

            gather(learner)
            check_finite(learner, out)
            row = {"epoch": epoch + 1} | means(learner, per_epoch) | {"lr": rate}
            row |= clock.row(learner.done)
            if task.predict and validation_due(epoch, settings):
                with clock.evaluating():
                    scores, predicted = validate(task, learner, settings)
                row |= scores
            rows.append(row)
            learner.terms, learner.diagnostics = {}, {}
            report(row, settings.epochs, clock.left(learner.done))
            runs.append_row(out, row)
            save_state(out, learner, rows, run, clock, signals)
            if clock.a_minute_passed():
                draw(out, rows)

    return finish(task, learner, rows, predicted, settings, out)


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


def check_agreement(learner: Learner) -> None:
    """Failed unless all processes go on from the same step."""
    steps = from_all(learner.done)
    if len(set(steps)) > 1:
        raise Failed(
            f"the processes go on from different steps ({steps}): --out must be on a disk that all "
            "of them see"
        )


def finish(
    task: Task, learner: Learner, rows: list, predicted, settings: Settings, out: Path
) -> dict:
    """Tests what was trained, and writes model.pt. `predicted`: what `validate` returned of it."""
    final, result, found = learner.average or task.net, dict(rows[-1]), {}
    if task.predict:
        test = task.data.test
        if test is not task.data.val or not predicted:
            predicted = predictions(task.predict, final, test, settings, learner.micro_batch)
        found = dict(zip(("predicted", "labels"), predicted, strict=True))
    elif task.test:
        with torch.no_grad():
            found = {name: value.cpu() for name, value in task.test(final.eval()).items()}
    if found:
        result["test_top1"] = top1(found["predicted"], found["labels"])
        if rank() == 0:
            storage.save(found, out / "test.pt")
    runs.write_rows(out, [*rows[:-1], result])
    if rank() == 0:
        about = {"classes": task.data.classes, "normalization": task.data.normalization}
        about |= {"method": task.name, "settings": vars(settings)}
        if task.data.held_out:  # a number: the same ones, if the folder grows
            about["settings"] = about["settings"] | {"holdout": task.data.held_out}
        storage.save(task.export(final) | about, out / "model.pt")
    draw(out, rows)
    if dist.is_initialized():
        dist.barrier()
    conclude(rows, out)
    if found:
        print0(f"test top-1 {result['test_top1']:.2f} %")
    return result


# Evaluation ---------------------------------------------------------------------------------------


@torch.no_grad()
def predictions(
    predict: Callable, net: nn.Module, images: Eval, settings: Settings, micro_batch: int = 64
) -> tuple[Tensor, Tensor]:
    """Predicted and true classes of all images, in order, on every process: two of (images,).

    `micro_batch`: how many fit in memory with their gradients; without, more do.
    """
    was_training = net.training
    net.eval()
    mixed = autocast(settings.amp, net)
    mine = [torch.zeros(2, 0, dtype=torch.long, device=next(net.parameters()).device)]
    for batch, labels in images.in_order(min(256, 4 * micro_batch)):
        with mixed:
            logits = predict(net, batch)
        predicted = torch.where(logits.isfinite().all(dim=-1), logits.argmax(dim=-1), -1)
        mine.append(torch.stack([predicted, labels]))
    net.train(was_training)
    found = torch.zeros(2, len(images), dtype=torch.long)
    for i, share in enumerate(from_all(torch.cat(mine, dim=1).cpu())):
        found[:, i :: world()] = share
    if (found < 0).any():
        raise Failed("logits are no longer finite: try a lower --lr or a longer --warmup")
    return found[0], found[1]


def accuracy(predict: Callable, net: nn.Module, images: Eval, *how) -> float:
    """Top-1 in per cent, exact over all ranks: none is counted twice. `how`: as of predictions."""
    return top1(*predictions(predict, net, images, *how))


def top1(predicted: Tensor, labels: Tensor) -> float:
    return 100 * (predicted == labels).sum().item() / len(labels)


def validation_due(epoch: int, settings: Settings) -> bool:
    return (epoch + 1) % settings.eval_every == 0 or epoch + 1 == settings.epochs


def validate(task: Task, learner: Learner, settings: Settings) -> tuple[dict[str, float], tuple]:
    """Accuracies for the log, and predictions: of the average of the weights, if there is one."""
    scores = {}
    for name, net in {"val_top1": task.net, "val_top1_ema": learner.average}.items():
        if net:
            predicted = predictions(task.predict, net, task.data.val, settings, learner.micro_batch)
            scores[name] = top1(*predicted)
    return scores, predicted


# What a run says and saves ------------------------------------------------------------------------


def gather(learner: Learner) -> None:
    """Replaces the sums of this process by their means over all, buffers by the first one's."""
    if dist.is_initialized():
        for value in (*learner.terms.values(), *learner.diagnostics.values()):
            dist.all_reduce(value.div_(world()))
        for net in filter(None, (learner.net, learner.average)):
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)


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
    out: Path, learner: Learner, rows: list, run: dict, clock: Clock, signals: list
) -> None:
    """Writes last.pt, and leaves if a signal asked for it.

    Within an epoch its sums are those of the first process, which a resumed run logs as if of all.
    """
    check_finite(learner, out)
    if rank() == 0:
        about = dict(run=run, rows=rows, seconds=clock.before + clock.elapsed())
        about |= dict(threads=torch.get_num_threads(), device=learner.device.type)
        storage.save(learner.state() | about, out / "last.pt")
    clock.saved = time.perf_counter()
    if signals:
        first_to_fail()  # so that the others leave without a word
        print0(
            f"\nstopped by a signal at step {learner.done}; --resume goes on from {out / 'last.pt'}"
        )
        sys.exit(128 + signals[0])


@contextlib.contextmanager
def interrupted() -> Iterator[list[int]]:
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


def draw(out: Path, rows: list[dict]) -> None:
    if rank() == 0:
        pictures.save(pictures.curves(rows), out / "curves.png", dpi=100)
