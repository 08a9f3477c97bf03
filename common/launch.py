"""From a command to processes and devices: one or many (`torchrun`), each error one line."""

import os
import re
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

ROOT = os.path.dirname(os.path.dirname(__file__))
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # memory without gaps


class Failed(RuntimeError):
    """The run failed, though its input was right: exit code 1 instead of 2."""


def run(main: Callable, parse: Callable) -> None:
    """Runs `main(parse(argv))`. An error is one line, and exit code 2 (input) or 1 (failed run)."""
    if "IPython" not in sys.modules:  # %run in a notebook
        os.environ["MPLBACKEND"] = "Agg"  # pictures are files, also for a notebook's !python
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a class may have any name
    try:
        if "WORLD_SIZE" in os.environ:  # torchrun
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        main(parse(sys.argv[1:]))
        print(end="", flush=True)
    except BrokenPipeError:  # `| head`
        os._exit(141)
    except (ValueError, OSError, RuntimeError, MemoryError, KeyboardInterrupt) as error:
        text, code = describe_error(error)
        if os.environ.get("TRACEBACK") or not code:  # TRACEBACK=1 python ...
            raise
        who = f"error (rank {rank()}): " if rank() else "error: "
        print(who + " ".join(text.split()), file=sys.stderr, flush=True)
        if dist.is_initialized() or "DataLoader worker" in str(error):
            os._exit(code)  # others may never reach a clean shutdown
        sys.exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


def describe_error(error: BaseException) -> tuple[str, int]:
    """What to say, and the exit code. Code 0 marks a bug, which keeps its traceback."""
    text, last = str(error).strip(), traceback.extract_tb(error.__traceback__)[-1]
    ours = last.filename.startswith(ROOT) and "-packages" not in last.filename
    meant = isinstance(error, ValueError) and ours and f"{last.line}".startswith("raise")
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if is_out_of_memory(error):
        return "out of memory: try a smaller --micro-batch (--batch stays the same)", 1
    if "in DataLoader worker process" in text:  # with the worker's traceback
        return text.splitlines()[-1].partition(": ")[2], 2
    if "DataLoader worker" in text:  # killed, or without shared memory: torch says which
        return f"{text} Try fewer --workers, or 0", 1
    if dist.is_initialized() and re.search(r"(closed|reset) by peer|likely closed", text):
        return "another process of this run has ended: its own error says why", 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}", 2
    return text, 1 if isinstance(error, Failed) else 2 if meant or isinstance(error, OSError) else 0


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has an error of its own for it. Other devices only say so."""
    words = "MemoryError|out of memory|t allocate memory|not enough memory|ALLOC_FAILED"
    return bool(re.search(words, f"{error!r}"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def collect(mine) -> list:
    """What each process passes in, in the order of ranks."""
    found = [mine] * world()
    if dist.is_initialized():
        dist.all_gather_object(found, mine)
    return found


def run_first(make: Callable) -> None:
    """Rank 0 does it. The others wait, for hours if it takes hours."""
    if rank() == 0:
        make()
    if dist.is_initialized():
        group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        dist.barrier(group)


def require_one_process() -> None:
    """ValueError under torchrun."""
    if world() > 1:
        raise ValueError("this runs in one process: start it with python, not torchrun")


def get_device(name: str) -> torch.device:
    """The device of a name ("auto": the best; torchrun: one for each), or a ValueError."""
    here = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        chosen = torch.device(here if name == "auto" else name)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", chosen.index or 0)))
            torch.cuda.set_device(chosen)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0][:100]
        raise ValueError(f"--device {name} is not available here ({reason})") from None
    return chosen


def device_name(where: torch.device) -> str:
    """A GPU by its name, a CPU by its threads, times the number of processes."""
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
    name += f", {torch.get_num_threads()} thread(s)" if where.type == "cpu" else ""
    return f"{world()} x ({name})" if world() > 1 else name


def print0(*words) -> None:
    if rank() == 0:
        print(*words, flush=True)
