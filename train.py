"""The one training loop. It knows no method: a method is two functions and a table of hyper-parameters.

    loss(net, images, labels) -> {"class": term, ...}    the loop minimises their sum and logs each by its name
    predict(net, images)      -> logits                  what evaluation calls

Copy, distillation and fine-tuning can be compared because everything else is literally the same code. One process or many
(`torchrun`), CPU, CUDA or MPS, float32 or mixed precision; a run killed at any moment goes on from `last.pt` with --resume.

A run leaves in --out: config.json (its settings), log.jsonl (a row per epoch), last.pt (to resume) and model.pt (to share).
"""

import argparse
import contextlib
import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

FLAGS = {  # name: default, help. What says how to run; what is learned is in the recipe of each script.
    "seed": (0, "the run is a function of it"),
    "out": ("", "folder of the run (empty: runs/METHOD-DATA-MODEL-sSEED)"),
    "resume": (False, "go on from --out/last.pt if it is there"),
    "overwrite": (False, "start over although --out holds a run"),
    "save_every": (600, "seconds between checkpoints within an epoch; there is one after each epoch anyway"),
    "device": ("auto", "cpu, cuda, mps, or auto"),
    "amp": ("auto", "off, bf16, fp16, or auto: bf16 where GPU or CPU have it, else fp16 on a GPU; off for tiny nets"),
    "micro_batch": (0, "images per GPU that fit in its memory; gradients add up to --batch (0: all at once)"),
    "compile": ("auto", "torch.compile the step: off, on, graphs (CUDA graphs too), or auto: on for long runs on CUDA"),
}
HELP = {  # of the entries that recipes share
    "model": "size of the ViT: micro, tiny, small, base, large or huge",
    "patch": "side of a patch in pixels",
    "teacher": "auto (pre-trained here if need be), mae (published weights), random, none, or a checkpoint's path or URL",
    "labels": "use so many of the training images, drawn by the seed (0: all)",
    "epochs": "passes over the training images",
    "warmup": "epochs of linear warm-up (unless given, it grows and shrinks with --epochs)",
    "batch": "images per optimiser step, over all GPUs",
    "lr": "peak learning rate, at this batch",
    "min_lr": "learning rate at the end of the cosine",
    "weight_decay": "AdamW's, of matrices only",
    "beta2": "AdamW's second beta (the first is 0.9)",
    "layer_decay": "factor on the learning rate per layer below the head (1: none)",
    "clip": "largest gradient norm (0: no limit)",
    "ema": "decay of the moving average of the weights (0: none), with a warm-up of its own",
    "drop_path": "probability of dropping a branch in the last block, rising linearly from 0",
    "crop_area": "least share of the image that a random resized crop keeps (0: small shifts instead)",
    "randaugment": "magnitude of RandAugment, two operations (0: none)",
    "erase": "probability of random erasing",
    "mixup": "alpha of MixUp (0: none)",
    "cutmix": "alpha of CutMix (0: none)",
    "smoothing": "label smoothing",
    "eval_every": "epochs between validations",
}
RANGES = {"epochs": (1, None), "batch": (1, None), "beta2": (0, 0.9999), "layer_decay": (0.01, 1), "ema": (0, 0.999999),
          "drop_path": (0, 0.99), "crop_area": (0, 1), "erase": (0, 1), "smoothing": (0, 0.99), "mask": (0.05, 0.95),
          "patch": (1, None), "eval_every": (1, None), "subset_seed": (-1, None), "randaugment": (0, 30),
          "steps": (1, None), "images": (4, None), "decoder_heads": (1, None), "decoder_dim": (4, None),
          "seed": (0, 2**63 - 1)}  # fmt: skip
# What may change between a run and its resumption.
FREE = {"out", "resume", "overwrite", "save_every", "device", "micro_batch", "compile", "workers", "data_dir"}


class Failed(RuntimeError):
    """The run failed, as opposed to the input being wrong: exit code 1 instead of 2."""


# The command line -----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def options(doc: str, recipe: dict, flags: dict, argv: list[str], positional: tuple[str, str] = ()) -> argparse.Namespace:
    """Settings for the data set that --data names: a column of `recipe` (digits, CIFAR, others), overridden by flags."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--data", default=flags["data"][0])
    name = first.parse_known_args(argv)[0].data
    column = 0 if name == "digits" else 1 if name.startswith("cifar") else 2
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    of_recipe = parser.add_argument_group(f"recipe (defaults for {name})")
    of_run = parser.add_argument_group("run")
    entries = {key: (row[column], HELP[key] if len(row) < 4 else row[3]) for key, row in recipe.items()}
    for key, (default, text) in (flags | entries).items():
        group = of_recipe if key in recipe else of_run
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(default, bool) else dict(type=type(default))
        group.add_argument("--" + key.replace("_", "-"), default=default, help=f"{text} [{default}]", **kind)
    if positional:
        parser.add_argument(positional[0], nargs="+", help=positional[1])
    args = parser.parse_args(argv)
    given = {word.partition("=")[0] for word in argv}
    if "--epochs" in given and "warmup" in entries and "--warmup" not in given:
        args.warmup = args.warmup * args.epochs // entries["epochs"][0]
    for key, value in vars(args).items():
        low, high = RANGES.get(key, (0, None))
        if not isinstance(value, (int, float)):
            continue
        if not (math.isfinite(value) and value >= low and (high is None or value <= high)):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ValueError(f"--{key.replace('_', '-')} {value}: must be {bounds}")
    return args


def run(main: Callable, options: Callable) -> None:
    """What a script does when it is called: `main(options(sys.argv))`, with each error as one line on stderr.

    Exit code 2 for input that is wrong, 1 for a run that failed. TRACEBACK=1 shows where it came from.
    """
    try:
        start_ranks()
        main(options(sys.argv[1:]))
    except (ValueError, OSError, Failed, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        if os.environ.get("TRACEBACK"):
            raise
        if isinstance(error, KeyboardInterrupt):
            text, code = "interrupted; --resume goes on from the last checkpoint", 130
        elif isinstance(error, torch.OutOfMemoryError):
            text, code = "the GPU's memory is full: try a smaller --micro-batch (--batch stays the same)", 1
        elif isinstance(error, OSError) and error.strerror:
            text, code = f"{error.strerror}: {error.filename}", 2
        else:
            text, code = str(error), 1 if isinstance(error, Failed) else 2
        print("error: " + " ".join(text.split()), file=sys.stderr, flush=True)
        os._exit(code) if dist.is_initialized() else sys.exit(code)  # other ranks may never reach a clean shutdown
    if dist.is_initialized():
        dist.destroy_process_group()


def start_ranks() -> None:
    """Joins the other processes if `torchrun` started this one."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words) -> None:
    if rank() == 0:
        print(*words, flush=True)


def device(args) -> torch.device:
    """--device, or what there is: CUDA, MPS, CPU. Under torchrun each process takes a GPU of its own."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        chosen = torch.device(found if args.device == "auto" else args.device)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(chosen)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} is not to be had here ({str(error).splitlines()[0]})") from None
    return chosen


# Precision, parameters, schedule ---------------------------------------------------------------------------------------


def precision(args, net: nn.Module) -> torch.dtype | None:
    """The dtype of mixed precision, or None for float32.

    auto is bf16 where the hardware multiplies it (a T4 would only emulate it: fp16 is what it is fast in). A net of under
    a million parameters is bound by calls, not by arithmetic: float32.
    """
    where, choices = next(net.parameters()).device.type, {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if args.amp in choices:
        return choices[args.amp]
    if args.amp != "auto":
        raise ValueError(f"--amp {args.amp}: choose off, bf16, fp16 or auto")
    if sum(p.numel() for p in net.parameters()) < 1e6:
        return None
    if where == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    about = Path("/proc/cpuinfo")  # on Linux
    return torch.bfloat16 if where == "cpu" and about.exists() and "bf16" in about.read_text() else None


def autocast(args, net: nn.Module):
    """The context of mixed precision: made once, entered at each step."""
    dtype = precision(args, net)
    return torch.autocast(next(net.parameters()).device.type, dtype) if dtype else contextlib.nullcontext()


def parameter_groups(net: nn.Module, args) -> list[dict]:
    """Weight decay for matrices only; layer decay lowers the rate by a factor per layer below the head (BEiT, MAE)."""
    groups = {}
    top = net.layer_of("head") if args.layer_decay < 1 else 0
    for name, p in net.named_parameters():
        if p.requires_grad:
            scale = args.layer_decay ** (top - net.layer_of(name)) if args.layer_decay < 1 else 1.0
            bare = p.ndim <= 1 or name.rpartition(".")[2] in ("pos_embed", "cls_token", "mask_token")
            decay = 0.0 if bare else args.weight_decay
            groups.setdefault((scale, decay), []).append(p)
    return [dict(params=params, scale=scale, weight_decay=decay) for (scale, decay), params in groups.items()]


def learning_rate(step: int, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Linear warm-up, then half a cosine from `peak` down to `floor`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def update_average(average: nn.Module, net: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of the weights. Young averages follow faster, so that short runs forget their start."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)


@torch.no_grad()
def accuracy(predict: Callable, net: nn.Module, part, args) -> float:
    """Top-1 in per cent, exact over all ranks: each counts its own images, none is counted twice."""
    was_training = net.training
    net.eval()
    where = next(net.parameters()).device
    counts, mixed = torch.zeros(2, dtype=torch.long, device=where), autocast(args, net)  # counts: correct, all
    for images, labels in part.plainly(args.micro_batch or 256):
        with mixed:
            hits = predict(net, images).argmax(dim=-1) == labels
        counts += torch.stack([hits.sum(), torch.tensor(len(hits), device=where)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    net.train(was_training)
    correct, all_images = counts.tolist()
    return 100 * correct / max(1, all_images)


# Checkpoints ------------------------------------------------------------------------------------------------------------


def save(what: dict, path: Path) -> None:
    """Writes a checkpoint whole or not at all: what stood there before stays until the new file is complete."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(what, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        kept = f" (what was saved before is intact: {path})" if path.exists() else ""
        raise Failed(f"could not write {path}: {error}. Is the disk full?{kept}") from error


def commit() -> str:
    """The commit of this repository, marked if the code has been changed since."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    try:
        head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", "*.py", "digits.npz")
    except OSError:  # no git here
        return "unknown"
    return (head or "unknown") + (" with changes" if changed else "")


def write_text(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def open_run(args, name: str) -> tuple[Path, dict | None]:
    """The run's folder, and the checkpoint to go on from. ValueError rather than spoil a run that is there."""
    name = f"{name}-{args.data}-{args.model}-s{args.seed}"
    out = Path(args.out or Path("runs") / name)
    out.mkdir(parents=True, exist_ok=True)
    last = out / "last.pt"
    if not last.exists() or (args.overwrite and not args.resume):
        return out, None
    if not args.resume:
        raise ValueError(f"{out} already holds a run: go on with --resume, start over with --overwrite, "
                         "or choose another --out")  # fmt: skip
    try:
        state = torch.load(last, map_location="cpu", weights_only=True)
        settings = state["args"]
    except Exception as error:  # unpickling errors are of many kinds
        raise ValueError(f"cannot resume from {last}, which is damaged ({type(error).__name__}): "
                         "start over with --overwrite") from error  # fmt: skip
    differ = [f"{k} was {settings.get(k)}, now {v}" for k, v in vars(args).items() if k not in FREE and settings.get(k) != v]
    if differ:
        raise ValueError(f"{out} holds a run with other settings ({'; '.join(differ[:3])}): choose another --out, "
                         "or start over with --overwrite")  # fmt: skip
    return out, state


# One step ---------------------------------------------------------------------------------------------------------------


class Step(nn.Module):
    """What DDP and torch.compile wrap: images and labels in, named losses out."""

    def __init__(self, net: nn.Module, loss: Callable):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self.loss(self.net, images, labels)


class Learner:
    """All that a step of training changes: the weights and their average, the optimiser, the running sums of the losses.

    `steps` is the length of the run. Nothing in `learn` waits for the GPU.
    """

    def __init__(self, net: nn.Module, loss: Callable, args, steps: int):
        where, self.args = next(net.parameters()).device, args
        self.net, self.at, self.sums = net, 0, {}
        self.average = copy.deepcopy(net).requires_grad_(False) if args.ema else None
        self.optimizer = torch.optim.AdamW(parameter_groups(net, args), lr=args.lr, betas=(0.9, args.beta2),
                                           fused=where.type in ("cuda", "cpu"))  # fmt: skip
        self.scaler = torch.amp.GradScaler(where.type, enabled=precision(args, net) is torch.float16)
        self.autocast = autocast(args, net)
        self.step = Step(net, loss)
        if dist.is_initialized():
            self.step = DistributedDataParallel(self.step, gradient_as_bucket_view=True)
        if (mode := compilation(args, where, steps)) != "off":
            self.step.compile(mode="reduce-overhead" if mode == "graphs" else None)

    def learn(self, images: Tensor, labels: Tensor, rate: float) -> None:
        """One step of the optimiser, at learning rate `rate`, on this process' share of a batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        piece = self.args.micro_batch or len(images)
        pieces = list(zip(images.split(piece), labels.split(piece), strict=True))
        for i, (some, their_labels) in enumerate(pieces):
            alone = i == len(pieces) - 1 or world() == 1  # the last piece exchanges the sum of the gradients
            with contextlib.nullcontext() if alone else self.step.no_sync():
                with self.autocast:
                    terms = self.step(some, their_labels)
                share = len(some) / len(images)
                self.scaler.scale(sum(terms.values()) * share).backward()
            for k, term in terms.items():
                self.sums[k] = self.sums.get(k, 0) + term.detach() * share
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.args.clip or math.inf)
        if not self.scaler.is_enabled():  # which skips steps with infinite gradients by itself
            self.sums["gradient"] = self.sums.get("gradient", 0) + norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.at += 1
        if self.average:
            update_average(self.average, self.net, self.args.ema, self.at)

    def state(self) -> dict:
        return dict(net=self.net.state_dict(), optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                    average=self.average.state_dict() if self.average else None, step=self.at, sums=self.sums)  # fmt: skip

    def restore(self, state: dict) -> None:
        for part in ("net", "optimizer", "scaler", "average"):
            if state[part] is not None:
                getattr(self, part).load_state_dict(state[part])
        where = next(self.net.parameters()).device
        self.at, self.sums = state["step"], {k: v.to(where) for k, v in state["sums"].items()}


def compilation(args, where: torch.device, steps: int) -> str:
    """--compile, with auto decided. Compiling takes minutes: only long runs on a GPU earn that back."""
    if args.compile not in ("auto", "off", "on", "graphs"):
        raise ValueError(f"--compile {args.compile}: choose off, on, graphs or auto")
    if args.compile == "auto":
        return "on" if where.type == "cuda" and steps >= 5000 else "off"
    return args.compile


# The loop ---------------------------------------------------------------------------------------------------------------


def fit(net: nn.Module, loss: Callable, predict: Callable | None, data, args, name: str, card: Callable) -> dict:
    """Trains `net` and returns the last row of its log, with `test_top1` (per cent) if there is a `predict`.

    `card(net)` is what model.pt holds: the weights and all that is needed to use them. If `args.ema` is set, it gets
    the average of the weights, and the accuracy reported is the average's. Failed if the loss stops being finite.
    """
    if args.batch % world():
        raise ValueError(f"--batch {args.batch} does not divide by the {world()} processes: choose a multiple")
    steps_per_epoch = len(data.train) // args.batch
    if not steps_per_epoch:
        raise ValueError(f"--batch {args.batch} is more than the {len(data.train)} training images")
    if args.warmup >= args.epochs:
        raise ValueError(f"--warmup {args.warmup}: must be less than --epochs {args.epochs}")
    steps, warmup = args.epochs * steps_per_epoch, round(args.warmup * steps_per_epoch)

    out, state = open_run(args, name)
    learner, seconds, rows = Learner(net, loss, args, steps), 0.0, []
    if state:
        learner.restore(state)
        seconds, rows = state["seconds"], state["rows"]
        say(f"{out}: going on from step {learner.at} of {steps}")
    if rank() == 0:
        about = {"torch": torch.__version__, "on": str(next(net.parameters()).device), "commit": commit()}
        write_text(out / "config.json", json.dumps(vars(args) | about, indent=1))
        write_text(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    resumed_at, began, evaluating = learner.at, time.perf_counter(), 0.0
    saved = shown = began

    def pace() -> tuple[float, float]:
        """Training images/s since the start or resumption, without evaluation; and seconds left, with it."""
        steps_done, elapsed = max(1, learner.at - resumed_at), time.perf_counter() - began
        return steps_done * args.batch / (elapsed - evaluating), elapsed / steps_done * (steps - learner.at)

    def checkpoint() -> None:
        nonlocal saved
        finite(learner, out)
        if rank() == 0:
            lasted = seconds + time.perf_counter() - began
            save(learner.state() | dict(args=vars(args), rows=rows, seconds=lasted), out / "last.pt")
        saved = time.perf_counter()
        if stop:
            say(f"\nstopped by a signal at step {learner.at} of {steps}; --resume goes on from {out / 'last.pt'}")
            sys.exit(128 + stop[0])

    net.train()
    with terminated() as stop:
        for epoch in range(learner.at // steps_per_epoch, args.epochs):
            for images, labels in data.train.epoch(epoch, learner.at % steps_per_epoch):
                rate = learning_rate(learner.at, steps, warmup, args.lr, args.min_lr)
                learner.learn(images, labels, rate)
                if time.perf_counter() - shown > 1:
                    shown = time.perf_counter()
                    finite(learner, out)
                    progress(learner, steps, steps_per_epoch, *pace())
                if learner.at % steps_per_epoch and (stop or time.perf_counter() - saved > args.save_every):
                    checkpoint()

            if dist.is_initialized():
                for term in learner.sums.values():
                    dist.all_reduce(term.div_(world()))
            finite(learner, out)
            speed, left = pace()
            terms = {k: (v / steps_per_epoch).item() for k, v in learner.sums.items()}
            lasted = seconds + time.perf_counter() - began
            row = {"epoch": epoch + 1, **terms, "lr": rate, "images_per_s": round(speed, 1), "seconds": round(lasted, 2)}
            if predict and ((epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs):
                before = time.perf_counter()
                row["val_top1"] = accuracy(predict, net, data.val, args)
                if learner.average:
                    row["val_top1_ema"] = accuracy(predict, learner.average, data.val, args)
                evaluating += time.perf_counter() - before
            rows, learner.sums = [*rows, row], {}
            if rank() == 0:
                with open(out / "log.jsonl", "a") as log:
                    log.write(json.dumps(row) + "\n")
            if (epoch + 1) % max(1, args.epochs // 10) == 0 or epoch + 1 == args.epochs:
                report(row, args.epochs, left)
            checkpoint()

    shared, result = learner.average or net, dict(rows[-1])
    if predict:
        last = result["val_top1_ema" if learner.average else "val_top1"]
        result["test_top1"] = last if data.test is data.val else accuracy(predict, shared, data.test, args)
        say(f"test top-1 {result['test_top1']:.2f} %  ({out / 'model.pt'})")
    if rank() == 0:
        write_text(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows[:-1], result]))
        save(card(shared), out / "model.pt")
    if dist.is_initialized():
        dist.barrier()
    return result


def finite(learner: Learner, out: Path) -> None:
    bad = [k for k, v in learner.sums.items() if not torch.isfinite(v)]
    if bad:
        what, last = "gradient norm" if bad[0] == "gradient" else f"{bad[0]} loss", out / "last.pt"
        raise Failed(f"the {what} is no longer finite at step {learner.at}: try a lower --lr, a longer "
                     "--warmup or --amp off" + (f"; the last good checkpoint is {last}" if last.exists() else ""))  # fmt: skip


@contextlib.contextmanager
def terminated():
    """A list that fills when SIGTERM or Ctrl-C arrives, so that the loop can save and leave between two steps.

    Of many processes only the first decides: the others would leave at other steps, and it could not save its own.
    """
    stop: list[int] = []
    handlers = {}
    with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
        for number in (signal.SIGTERM, signal.SIGINT):
            handlers[number] = signal.signal(number, lambda received, _: rank() or stop.append(received))
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def progress(learner: Learner, steps: int, per_epoch: int, speed: float, left: float) -> None:
    """The line that rewrites itself on a terminal."""
    if rank() or not sys.stdout.isatty():
        return
    epoch, done = divmod(learner.at - 1, per_epoch)
    terms = "  ".join(f"{k} {v.item() / (done + 1):.3f}" for k, v in learner.sums.items() if k != "gradient")
    line = f"epoch {epoch + 1}  step {done + 1}/{per_epoch}  {terms}  {speed:,.0f} img/s  {clock(left)} left"
    print("\r" + line[: shutil.get_terminal_size().columns - 1].ljust(79), end="", flush=True)


def report(row: dict, epochs: int, left: float) -> None:
    skip = {"epoch", "gradient", "lr", "images_per_s", "seconds", "val_top1", "val_top1_ema"}
    words = [f"epoch {row['epoch']:>3}/{epochs}", *(f"{k} {v:.3f}" for k, v in row.items() if k not in skip)]
    if "val_top1" in row:
        words.append(f"val {row['val_top1']:.1f} %" + (f" (EMA {row['val_top1_ema']:.1f})" if "val_top1_ema" in row else ""))
    words += [f"{row['images_per_s']:,.0f} img/s", f"{clock(left)} left"]
    say(("\r\033[K" if sys.stdout.isatty() else "") + "  ".join(words))
