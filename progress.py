"""How long a run has lasted, how fast it is, and what it says of that on the terminal."""

from launch import Every, device_name, on_terminal, print0, rewrite, world

import contextlib
import textwrap
import time
from pathlib import Path

import pictures
from families import COMPONENTS
from learner import Learner, precision_name
from vit import Config


class Clock:
    """How long a run has lasted, how fast it trains and how long it will take."""

    def __init__(self, step: int, steps: int, batch: int, seconds: float):
        self.first, self.steps, self.batch = step, steps, batch
        self.before, self.evaluation = seconds, 0.0  # `before` this process, which began at `first`
        self.began = self.saved = time.perf_counter()
        self.a_second_passed, self.a_minute_passed = Every(1), Every(60)
        self.announced = False  # how long it will take

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
    """The line that rewrites itself on a terminal; elsewhere, once, how long it will take."""
    epoch, step = divmod(learner.done - 1, per_epoch)
    pace = f"{clock.speed(learner.done):,.0f} images/s  {clock.left(learner.done)} left"
    if not on_terminal() and clock.elapsed() > 5 and not clock.announced:
        clock.announced = True
        print0(f"epoch {epoch + 1}/{learner.settings.epochs}  {pace}")
    terms = "  ".join(f"{k} {v.item() / (step + 1):.3f}" for k, v in learner.terms.items())
    rewrite(f"epoch {epoch + 1}  step {step + 1}/{per_epoch}  {terms}  {pace}")


def report(row: dict, epochs: int, left: str) -> None:
    """A line for every tenth of the epochs: terms, diagnostics, accuracy or the time left."""
    epoch = row["epoch"]
    if epoch % max(1, epochs // 10) and epoch != epochs:
        return
    terms = [f"{k} {v:#.3g}" for k, v in row.items() if k not in pictures.NO_TERMS]
    words = [f"epoch {epoch:>3}/{epochs}", *terms]
    if "val_top1_ema" in row:
        words.append(f"val {row['val_top1_ema']:.1f} % (EMA)")
    elif "val_top1" in row:
        words.append(f"val {row['val_top1']:.1f} %")
    words.append(f"{left} left")
    rewrite("")
    print0("  ".join(words))


def introduce(task, learner: Learner, out: Path, rate: float) -> None:
    """What is about to be trained, on what, how, and where it goes."""
    settings, images = learner.settings, task.data
    teacher = task.teacher or (
        "random weights" if getattr(settings, "teacher", "") == "random" else ""
    )
    if teacher and "layers" in vars(settings):
        teacher = f"{teacher}; --layers {settings.layers}"
    lines = {
        "net": f"{settings.model}: {size_of(task.net)}",
        "teacher": teacher,
        "images": f"{settings.data}, {images.described(labels=bool(task.predict))}",
        "device": f"{device_name(learner.device)}, {precision_name(settings.amp, task.net)}",
        "steps": f"{settings.epochs} epochs of {plan(learner, images.train, rate)}",
    }
    print0(f"{task.name} -> {out}")
    for name, line in lines.items():
        if line:
            how = dict(break_on_hyphens=False, break_long_words=False)  # paths can be copied
            print0(textwrap.fill(f"  {name:<8} {line}", 79, subsequent_indent=" " * 11, **how))


def size_of(net) -> str:
    config = getattr(net, "config", None)
    trained = f"{sum(p.numel() for p in net.parameters() if p.requires_grad):,} parameters"
    if not config:  # no ViT
        return trained
    components = {name: getattr(config, name) for name in COMPONENTS}
    beyond = [f"{k} {v}" for k, v in components.items() if v != getattr(Config, k)]
    return (
        f"{config.dim} wide, {config.depth} deep, {config.heads} heads, "
        f"{config.side**2} patches of {config.patch} x {config.patch}; {trained}"
        + (f"; {', '.join(beyond)}" if beyond else "")
    )


def plan(learner: Learner, train, rate: float) -> str:
    """The batches of an epoch, and what was adapted to them."""
    settings, batch = learner.settings, train.batch
    said = f"{len(train) // batch} batches of {batch}"
    if not settings.batch:
        said += " (1/8 of the images, at most 64)"
    if learner.micro_batch < batch // world():
        said += f", {learner.micro_batch} images at a time"
    said += f"; rate {rate:.3g}"
    if rate != settings.lr:
        said += f" ({settings.lr:g} at batch {settings.lr_batch})"
    return f"{said}, warm-up {settings.warmup:g} epochs"


def validation(row: dict) -> float:
    """Accuracy on the validation images: of the average of the weights, if there is one."""
    return row.get("val_top1_ema", row["val_top1"])


def conclude(rows: list[dict], out: Path) -> None:
    """The best epoch of validation, if it is not the last, and where everything is."""
    validated = [row for row in rows if "val_top1" in row]
    best = max(validated, key=validation, default=None)
    if best and validation(best) > validation(validated[-1]):
        print0(
            f"best validation: {validation(best):.1f} % after epoch {best['epoch']} "
            f"(what is reported is the last, {validation(validated[-1]):.1f} %)"
        )
    left = ("model.pt", "test.pt", "log.jsonl", "curves.png", "last.pt")
    print0(f"{out}: {', '.join(name for name in left if (out / name).exists())}")
