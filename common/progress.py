"""What a run says: what it is, how it goes and how fast, how it ended."""

import textwrap
import time
from datetime import timedelta
from pathlib import Path

import torch

from common.hardware import choose_precision
from common.launch import device_name, print0, world

# In the log, but not on the line of an epoch.
NOT_SHOWN = "epoch loss gradient_norm lr images_per_s seconds val_top1 val_top1_ema".split()


class Clock:
    """How long a run has lasted, how fast it trains and how long it will take."""

    def __init__(self, step: int, steps: int, batch: int, seconds: float):
        self.first, self.steps, self.batch = step, steps, batch
        self.before, self.evaluation = seconds, 0.0  # `before` this process, which began at `first`
        self.began = self.saved = self.ticked = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def passed_a_minute(self) -> bool:
        """True once a minute, and once after a longer pause."""
        passed = time.perf_counter() - self.ticked > 60
        self.ticked = time.perf_counter() if passed else self.ticked
        return passed

    def left(self, step: int) -> str:
        seconds = self.elapsed() / max(1, step - self.first) * (self.steps - step)
        return str(timedelta(seconds=round(seconds))).removeprefix("0:")

    def row(self, step: int) -> dict[str, float]:
        speed = max(1, step - self.first) * self.batch / (self.elapsed() - self.evaluation)
        return {"images_per_s": round(speed, 1), "seconds": round(self.before + self.elapsed(), 2)}


def introduce(task, settings, out: Path, micro_batch: int, rate: float) -> None:
    """What is about to be trained, on what, how, and where it goes."""
    net, batch = task.net, task.data.train.batch
    where = next(net.parameters()).device
    device = f"{device_name(where)}, {choose_precision(settings.amp, net)}".replace("torch.", "")
    if where.type == "cuda" and world() == 1 < (gpus := torch.cuda.device_count()):
        device += f"; one of {gpus} GPUs (torchrun --nproc_per_node={gpus} uses all)"
    teacher = task.checkpoint or ("random weights" if settings.teacher == "random" else "")
    if teacher and hasattr(settings, "layers"):
        teacher = f"{teacher}; its maps in --layers {settings.layers}"
    if task.checkpoint and (seen := task.data.count_learned(task.checkpoint.learned_from)):
        teacher = f"{teacher}; trained on {seen:,} of the test images"
    steps = f"{settings.epochs} epochs of {task.data.train.steps} x {batch} images"
    if micro_batch < batch // world():
        steps += f", {micro_batch} images at a time"
    shape = f"{sum(p.numel() for p in net.parameters() if p.requires_grad):,} parameters to learn"
    if config := getattr(net, "config", None):
        shape = f"{config.dim} wide, {config.depth} deep, {config.heads} heads; {shape}"
    lines = {
        "net": shape,
        "teacher": teacher,
        "images": f"{settings.data}, {task.data.describe(labels=bool(task.predict))}",
        "device": device,
        "steps": f"{steps}; learning rate {rate:.3g}, warm-up {settings.warmup:.0%}",
    }
    print0(f"{settings.method} -> {out}")
    wrap = textwrap.TextWrapper(79, "", " " * 11, break_long_words=False, break_on_hyphens=False)
    for name, line in lines.items():
        if line:
            print0(wrap.fill(f"  {name:<8} {line}"))


def show_row(row: dict, epochs: int, left: str) -> None:
    """The terms that the method watches, or its loss; accuracy, and the time left."""
    terms = {k: v for k, v in row.items() if k not in NOT_SHOWN} or {"loss": row["loss"]}
    words = [f"epoch {row['epoch']:>3.4g}/{epochs}", *(f"{k} {v:#.3g}" for k, v in terms.items())]
    if "val_top1" in row:
        average = " (EMA)" if "val_top1_ema" in row else ""
        words.append(f"val {get_validation(row):.1f} %{average}")
    print0("  ".join([*words, f"{left} left"]))


def get_validation(row: dict) -> float:
    """Accuracy on the validation images: of the average of the weights, if there is one."""
    return row.get("val_top1_ema", row["val_top1"])


def conclude(result: dict, out: Path, warning: str) -> None:
    left = ("model.pt", "test.pt", "log.jsonl", "last.pt")
    print0(f"{out}: {', '.join(name for name in left if (out / name).exists())}")
    if "test_top1" in result:
        print0(f"test top-1 {result['test_top1']:.2f} %{warning}")
