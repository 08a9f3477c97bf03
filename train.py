"""The one training loop: a Task in, a row of results out. It is the same for every method.

Copy, distillation and fine-tuning can be compared because everything else is the same code. One
process or many (`torchrun`), CPU, CUDA or MPS, float32 or mixed precision. A run killed at any
moment continues with --resume. What it leaves in --out: USAGE.md.
"""

import contextlib
import math
import re
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
from common import checkpoints, runs
from common.hardware import autocast, choose_compilation, choose_precision, find_micro_batch
from common.launch import Failed, collect, print0, rank, run_first, world
from common.progress import Clock, conclude, introduce, show_row
from common.settings import get_values
from recipes import Settings


@dataclass
class Task:
    """What a method is, for the loop."""

    net: nn.Module
    data: data.Data
    loss: Callable[..., tuple[Tensor, dict]]  # (net, images, labels) -> loss, scalars to log
    predict: Callable[..., Tensor] | None = nn.Module.__call__  # (net, images) -> logits
    export: Callable[..., dict] = checkpoints.export  # (net) -> what model.pt holds
    checkpoint: checkpoints.Checkpoint | None = None  # of the teacher: the same for --resume


def fit(task: Task, settings: Settings, test: Callable | None = None) -> dict:
    """Trains the task's net. Returns the last row of its log, `test_top1` if tested.

    `test(net)` -> {"predicted", "labels"}: for methods without predict. With --ema the average of
    the weights is reported and saved. Raises Failed if the loss is no longer finite.
    """
    if task.predict:
        task.data.check_classes()
    runs.check_folder(settings)
    with runs.lock(runs.get_folder(settings)) as out:
        return run_epochs(task, settings, out, test)


def run_epochs(task: Task, settings: Settings, out: Path, test: Callable | None) -> dict:
    images, epochs = task.data.train, settings.epochs
    per_epoch = images.steps
    steps, warmup = epochs * per_epoch, round(settings.warmup * epochs * per_epoch)
    peak = settings.lr or settings.blr * images.batch / 256  # Goyal et al. 2017
    run = runs.describe_run(settings, task.data, task.checkpoint)
    state = runs.load_state(out, settings, run)
    learner = Learner(task, settings)
    learner.micro_batch = settings.micro_batch or find_micro_batch(task, learner.compute_loss)
    whole = learner.micro_batch >= images.batch // images.world
    learner.wrap_loss(choose_compilation(settings.compile, learner.device, steps, whole))
    introduce(task, settings, out, learner.micro_batch, peak)
    rows, seconds = learner.restore(state) if state else ([], 0.0)
    if len(set(collect(learner.done))) > 1:
        raise Failed("the processes resume from different steps: all must see the same --out disk")
    del state  # gigabytes, for a large net
    clock = Clock(learner.done, steps, images.batch, seconds)
    runs.begin(out, run, settings, learner, rows)
    task.net.train()
    for epoch in range(learner.done // per_epoch, epochs):
        for batch, labels in images.epoch(epoch, start=learner.done % per_epoch):
            rate = get_learning_rate(learner.done, steps, warmup, peak, settings.final_lr)
            learner.train_step(batch, labels, rate)
            within = learner.done % per_epoch
            if within and clock.passed_a_minute():
                runs.check_finite(learner.sums)
                row = {"epoch": learner.done / per_epoch} | learner.get_means(within)
                show_row(row, epochs, clock.left(learner.done))
            if within and time.perf_counter() - clock.saved > settings.save_every:
                learner.save(out, rows, run, clock)

        learner.average_over_ranks()
        runs.check_finite(learner.sums)
        last, row = epoch + 1 == epochs, {"epoch": epoch + 1} | learner.get_means(per_epoch)
        row |= {"lr": rate} | clock.row(learner.done)
        if task.predict and (last or (epoch + 1) % settings.eval_every == 0):
            began = time.perf_counter()
            row |= learner.validate(task)
            clock.evaluation += time.perf_counter() - began
        rows.append(row)
        learner.sums = {}
        if last or (epoch + 1) % max(1, epochs // 10) == 0:
            show_row(row, epochs, clock.left(learner.done))
        runs.write_rows(out, [row], "a")
        long_ago = time.perf_counter() - clock.saved > 1  # seconds: small epochs are shorter
        if last or long_ago or not epoch:  # the first shows whether the disk can be written
            learner.save(out, rows, run, clock)
    return finish(task, learner, rows, out, test)


class LossModule(nn.Module):
    """What DDP and torch.compile wrap: images and labels in, loss and what is shown out."""

    def __init__(self, net: nn.Module, loss: Callable):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(self.net, images, labels)


class Learner:
    """The state of training, and one step of it. Nothing in a step waits for the GPU."""

    def __init__(self, task: Task, settings: Settings):
        net = self.net = task.net
        self.device, self.settings, self.done = next(net.parameters()).device, settings, 0
        self.sums: dict[str, Tensor] = {}  # over an epoch: the loss, and what is shown
        self.optimizer = torch.optim.AdamW(
            group_parameters(net, settings.weight_decay, settings.layer_decay),
            betas=(0.9, settings.beta2),
            fused=self.device.type in ("cuda", "cpu"),
        )
        self.loss_module: Any = LossModule(net, task.loss)
        self.average = deepcopy(net).requires_grad_(False) if settings.ema else None
        self.precision = choose_precision(settings.amp, net)
        fp16 = self.precision is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.autocast = autocast(settings.amp, net)
        self.micro_batch = task.data.train.batch // task.data.train.world  # images at a time

    def wrap_loss(self, compilation: str) -> None:
        """With DDP and torch.compile."""
        if dist.is_initialized():
            self.loss_module = DistributedDataParallel(
                self.loss_module, gradient_as_bucket_view=True
            )
        if compilation != "off":
            mode = "reduce-overhead" if compilation == "graphs" else None
            self.loss_module.compile(mode=mode)

    def train_step(self, images: Tensor, labels: Tensor, rate: float) -> None:
        """One step of the optimizer on this process' share of a batch, in pieces that fit."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        pieces = [x.split(self.micro_batch) for x in (images, labels)]
        last = len(pieces[0]) - 1  # DDP exchanges gradients only after the last piece
        for i, (some, some_labels) in enumerate(zip(*pieces, strict=True)):
            skip_sync = i < last and world() > 1
            with self.loss_module.no_sync() if skip_sync else contextlib.nullcontext():
                share = len(some) / len(images)
                self.scaler.scale(self.compute_loss(some, some_labels, share) * share).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip or math.inf)
        if not self.scaler.is_enabled():  # it skips steps with infinite gradients by itself
            self.add({"gradient_norm": norm}, 1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.done += 1
        if self.average:
            self.move_average(self.average)

    def compute_loss(self, images: Tensor, labels: Tensor, share: float = 0.0) -> Tensor:
        with self.autocast:
            found = self.loss_module(images, labels)
        loss, shown = found if isinstance(found, tuple) else (found, None)
        scalars: list = [loss, *shown.values()] if isinstance(shown, dict) else [None]
        words = "a loss returns a scalar tensor, and a dict of scalar tensors to log"
        assert all(map(torch.is_tensor, scalars)) and not any(map(Tensor.dim, scalars)), words
        if share:
            self.add(shown | {"loss": loss}, share)
        return loss

    def add(self, values: dict[str, Tensor], share: float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach() * share

    @torch.no_grad()
    def move_average(self, average: nn.Module) -> None:
        """Exponential, with a smaller decay at first, to forget the initial weights."""
        warm_up = (self.done - 1) / (self.done + 8)  # 0 after the first step; TensorFlow's rule
        decay = min(self.settings.ema, warm_up)
        averages: list[Tensor] = [*average.parameters()]
        torch._foreach_lerp_(averages, [*self.net.parameters()], 1 - decay)
        for buffer, value in zip(average.buffers(), self.net.buffers(), strict=True):
            buffer.copy_(value)

    def average_over_ranks(self) -> None:
        """Sums become means over all processes. Buffers are copied from rank 0."""
        if dist.is_initialized():
            for value in self.sums.values():
                dist.all_reduce(value.div_(world()))
            for net in filter(None, (self.net, self.average)):
                for buffer in net.buffers():
                    dist.broadcast(buffer, 0)

    def get_means(self, steps: int) -> dict[str, float]:
        return {name: value.item() / steps for name, value in self.sums.items()}

    def evaluate(self, task: Task, net: nn.Module, images) -> tuple[Tensor, Tensor]:
        at_a_time = min(256, 4 * self.micro_batch)
        return predict_classes(task.predict, net, images, self.settings.amp, at_a_time)

    def validate(self, task: Task) -> dict[str, float]:
        """Accuracies on the validation images: of the weights, and of their average."""
        nets = {"val_top1": self.net} | ({"val_top1_ema": self.average} if self.average else {})
        found = {name: self.evaluate(task, net, task.data.val) for name, net in nets.items()}
        return {name: compute_top1(*predicted) for name, predicted in found.items()}

    def parts(self) -> dict:
        parts = {"net": self.net, "optimizer": self.optimizer, "scaler": self.scaler}
        return parts | ({"average": self.average} if self.average else {})

    def save(self, out: Path, rows: list, run: dict, clock: Clock) -> None:
        """Writes last.pt. Failed, before it is spoiled, if a loss or a weight is not finite."""
        weights = {"the sum of all weights": sum(p.detach().sum() for p in self.net.parameters())}
        runs.check_finite(self.sums | weights)
        if rank() == 0:
            state = {name: part.state_dict() for name, part in self.parts().items()}
            state |= {"step": self.done, "rows": rows, "run": run}
            state["sums"] = self.sums  # of this process: good enough for a log
            checkpoints.save(state | clock.row(self.done), out / "last.pt")
        clock.saved = time.perf_counter()

    def restore(self, state: dict) -> tuple[list[dict], float]:
        """Continues from a saved state. Returns the log so far, and its seconds."""
        for name, part in self.parts().items():
            if state[name]:  # the scaler's is empty without fp16
                part.load_state_dict(state[name])
        self.done = state["step"]
        self.sums = {k: v.to(self.device) for k, v in state["sums"].items()}
        print0(f"resuming from step {self.done}")
        return list(state["rows"]), float(state["seconds"])


def get_learning_rate(step: int, steps: int, warmup: int, peak: float, final: float) -> float:
    """Linear warm-up, then half a cosine from `peak` down to `final` times that."""
    if step < warmup:
        return peak * (step + 1) / warmup
    cosine = math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    return peak * (final + (1 - final) * 0.5 * (1 + cosine))


def group_parameters(net: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Weight decay for matrices only. Layer decay: a factor per layer below the head."""
    groups: dict[tuple, dict] = {}
    head = len(getattr(getattr(net, "encoder", net), "blocks", ())) + 1  # encoder: of an MAE
    for name, p in net.named_parameters():
        if p.requires_grad:
            block = re.match(r"(encoder\.)?blocks\.(\d+)", name)
            on_top = re.match(r"(encoder\.)?(fc_norm|head)|decoder|mask_token", name)
            layer = int(block[2]) + 1 if block else head if on_top else 0
            undecayed = p.ndim <= 1 or name.endswith(("pos_embed", "_token"))
            scale, decay = layer_decay ** (head - layer), 0.0 if undecayed else weight_decay
            group = dict(params=[], scale=scale, weight_decay=decay)
            groups.setdefault((scale, decay), group)["params"].append(p)
    return [*groups.values()]


@torch.no_grad()
def predict_classes(predict: Any, net: nn.Module, images, amp: str, at_a_time: int = 256):
    """Predicted and true classes (images,) of all images, in order, the same on every process."""
    was_training, mixed, total = net.training, autocast(amp, net), torch.zeros(())
    net.eval()
    mine = [torch.zeros(2, 0, dtype=torch.long, device=next(net.parameters()).device)]
    for batch, labels in images.in_order(at_a_time):
        with mixed:
            logits = predict(net, batch)
        total = total + logits.float().sum()
        mine.append(torch.stack([logits.argmax(dim=-1), labels]))
    runs.check_finite({"the sum of all logits": total})
    net.train(was_training)
    found = torch.zeros(2, len(images), dtype=torch.long)
    for i, share in enumerate(collect(torch.cat(mine, dim=1).cpu())):
        found[:, i :: world()] = share
    return found[0], found[1]


def compute_top1(predicted: Tensor, labels: Tensor) -> float:
    """Accuracy in per cent."""
    return 100 * (predicted == labels).sum().item() / len(labels)


def finish(task: Task, learner: Learner, rows: list, out: Path, test: Callable | None) -> dict:
    """Tests what was trained, and writes model.pt."""
    net, settings, found = learner.average or task.net, learner.settings, {}
    if task.predict:
        predicted, labels = learner.evaluate(task, net, task.data.test)
        found = {"predicted": predicted, "labels": labels}
    elif test:
        with torch.no_grad():
            found = {name: value.cpu() for name, value in test(net.eval()).items()}
    result = dict(rows[-1])
    if found:
        result["test_top1"] = compute_top1(found["predicted"], found["labels"])
    runs.write_rows(out, [*rows[:-1], result])
    seen = task.data.train.source.contents, getattr(task.checkpoint, "learned_from", None)
    known = [hashes for hashes in seen if hashes is not None]
    learned = torch.cat(known) if known else None  # by the net, and by its teacher

    def write() -> None:
        if found:
            checkpoints.save(found, out / "test.pt")
        kept = get_values(settings) | {"holdout": task.data.holdout}
        about = {"method": settings.method, "classes": task.data.classes, "settings": kept}
        checkpoints.save(task.export(net) | about | {"learned_from": learned}, out / "model.pt")

    run_first(write)
    conclude(result, out, task.data.describe_repeats(learned=learned))
    return result
