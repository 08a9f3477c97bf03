"""From a command to processes and devices: one or many (`torchrun`), each error one line.

Scripts import it first, so that Ctrl-C while the others are imported is one line too.
"""

import os
import signal
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def leave(*_) -> None:
    print("error: interrupted", file=sys.stderr)
    os._exit(130)


# Only where a script of ours is what runs: not in a notebook, not in tests.
SCRIPTS = (HERE, *(os.path.join(HERE, name) for name in ("experiments", "related", "speed")))
if os.path.dirname(getattr(sys.modules["__main__"], "__file__", "") or "") in SCRIPTS:
    signal.signal(signal.SIGINT, leave)  # until `run` begins
    os.environ.setdefault("MPLBACKEND", "Agg")  # pictures are files: a display may go away

import contextlib  # noqa: E402
import shutil  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterable, Iterator  # noqa: E402
from datetime import timedelta  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402


class Failed(RuntimeError):
    """The run failed, as opposed to the input being wrong: exit code 1 instead of 2."""


def run(main: Callable, parse: Callable) -> None:
    """What a script does when it is called: `main(parse(argv))`, each error one line on stderr.

    Exit code 2 for input that is wrong, 1 for a run that failed. TRACEBACK=1 shows the traceback.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        start_ranks()
        main(parse(sys.argv[1:]))
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head`: who listened has gone
        os._exit(141)
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:
        text, code = describe(error)
        first = first_to_fail()  # what the others say follows from it
        if os.environ.get("TRACEBACK") or (first and not code):
            raise
        if first:
            print("error: " + " ".join(text.split()), file=sys.stderr, flush=True)
        if dist.is_initialized():  # other ranks may never reach a clean shutdown
            os._exit(code or 1)
        sys.exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


def describe(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the exit code. Code 0: it is a fault of the program."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if out_of_memory(error):
        return "the memory is full: try a smaller --micro-batch (--batch stays the same)", 1
    if "DataLoader worker" in str(error):
        return (
            "a process that decodes images was killed (is the memory full?): try fewer --workers; "
            "--resume goes on"
        ), 1
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else ""), 2
    if isinstance(error, Failed):
        return str(error), 1
    return str(error), 0 if isinstance(error, RuntimeError) else 2


def out_of_memory(error: BaseException) -> bool:
    """CUDA has an error of its own for it; others only say so."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def first_to_fail() -> bool:
    """Whether no other process has said that something is wrong: all would say the same."""
    if not dist.is_initialized():
        return True
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add(f"failed-{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except (RuntimeError, AttributeError):  # the store has gone
        return rank() == 0


def start_ranks() -> None:
    """Joins the other processes if `torchrun` started this one."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # With GPUs both, so that --device cpu works there too.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def from_all(mine) -> list:
    """What each process has in place of `mine`, the first one's first."""
    found = [mine] * world()
    if dist.is_initialized():
        dist.all_gather_object(found, mine)
    return found


def first_alone(make: Callable) -> None:
    """Done by the first process, while the others wait, for hours if it takes hours."""
    if rank() == 0:
        make()
    if dist.is_initialized():
        dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(days=1)))


def one_process() -> None:
    """ValueError under torchrun."""
    if world() > 1:
        raise ValueError("this runs in one process: start it with python, not torchrun")


def print0(*words) -> None:
    """Prints on the first process only."""
    if rank() == 0:
        print(*words, flush=True)


class Every:
    """True once every few seconds."""

    def __init__(self, seconds: float):
        self.seconds, self.last = seconds, time.perf_counter()

    def __call__(self) -> bool:
        now = time.perf_counter()
        due = now - self.last > self.seconds
        if due:
            self.last = now
        return due


def counted(things: Iterable, total: int, words: str) -> Iterator:
    """The things, counted on a terminal if they take more than a second."""
    due = Every(1)
    try:
        for i, thing in enumerate(things, 1):
            yield thing
            if due():
                rewrite(f"{i:,} of {total:,} {words}")
    finally:
        rewrite("")


def rewrite(line: str) -> None:
    """On a terminal: the line in place of the one before."""
    if rank() == 0 and on_terminal():
        print("\r\033[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)


def on_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """What was begun is cleared away when SIGTERM ends the process. (A decorator as well.)"""
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, before)


def device(name: str) -> torch.device:
    """The device of a name; "auto" is what there is: CUDA, MPS, CPU.

    Under torchrun each process takes a GPU of its own.
    """
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        chosen = torch.device(here if name == "auto" else name)
        if chosen.type == "cuda" and (chosen.index is None or "LOCAL_RANK" in os.environ):
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        torch.zeros(1, device=chosen).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0][:100]
        raise ValueError(f"--device {name} is not available here ({reason})") from None
    return chosen


def device_name(where: torch.device) -> str:
    """What computes: a GPU by its name, a CPU by its threads; times the number of processes."""
    threads = torch.get_num_threads()
    name = f"{where.type}, {threads} thread{'s' if threads > 1 else ''}"
    if where.type != "cpu":
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
    return f"{world()} x ({name})" if world() > 1 else name
