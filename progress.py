"""How long a run has lasted, how fast it is, and what it says of that on the terminal."""

import contextlib
import shutil
import sys
import time

from launch import print0, rank
from learner import Learner


class Clock:
    """How long a run has lasted, how fast it trains and how long it will take."""

    def __init__(self, step: int, steps: int, batch: int, seconds: float):
        self.first, self.steps, self.batch = step, steps, batch
        self.before, self.evaluation = seconds, 0.0  # `before` this process, which began at `first`
        self.began = self.shown = self.saved = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def speed(self, step: int) -> float:
        """Training images/s, without evaluation."""
        return max(1, step - self.first) * self.batch / (self.elapsed() - self.evaluation)

    def left(self, step: int) -> str:
        return minutes(self.elapsed() / max(1, step - self.first) * (self.steps - step))

    def row(self, step: int) -> dict[str, float]:
        seconds = self.before + self.elapsed()
        return {"images_per_s": round(self.speed(step), 1), "seconds": round(seconds, 2)}

    def a_second_passed(self) -> bool:
        passed = time.perf_counter() - self.shown > 1
        if passed:
            self.shown = time.perf_counter()
        return passed

    def unsaved(self) -> float:
        return time.perf_counter() - self.saved

    @contextlib.contextmanager
    def evaluating(self):
        began = time.perf_counter()
        yield
        self.evaluation += time.perf_counter() - began


def minutes(seconds: float) -> str:
    whole, seconds = divmod(round(seconds), 60)
    return f"{whole // 60}:{whole % 60:02}:{seconds:02}" if whole >= 60 else f"{whole}:{seconds:02}"


def progress_line(learner: Learner, per_epoch: int, clock: Clock) -> None:
    """The line that rewrites itself on a terminal."""
    if rank() or not sys.stdout.isatty():
        return
    epoch, step = divmod(learner.done - 1, per_epoch)
    terms = "  ".join(f"{k} {v.item() / (step + 1):.3f}" for k, v in learner.terms.items())
    pace = f"{clock.speed(learner.done):,.0f} img/s  {clock.left(learner.done)} left"
    line = f"epoch {epoch + 1}  step {step + 1}/{per_epoch}  {terms}  {pace}"
    print("\r" + line[: shutil.get_terminal_size().columns - 1].ljust(79), end="", flush=True)


def report(row: dict, epochs: int, left: str) -> None:
    """A line for every tenth of the epochs: terms, diagnostics, accuracy or the time left."""
    epoch = row["epoch"]
    if epoch % max(1, epochs // 10) and epoch != epochs:
        return
    own = {"epoch", "gradient_norm", "lr", "images_per_s", "seconds", "val_top1", "val_top1_ema"}
    words = [
        f"epoch {epoch:>3}/{epochs}",
        *(f"{k} {v:#.3g}" for k, v in row.items() if k not in own),
    ]
    if "val_top1_ema" in row:
        words.append(f"val {row['val_top1_ema']:.1f} % (EMA)")
    elif "val_top1" in row:
        words.append(f"val {row['val_top1']:.1f} %")
    else:
        words.append(f"{left} left")
    print0(("\r\033[K" if sys.stdout.isatty() else "") + "  ".join(words))
