"""From a command to processes and devices: one or many (`torchrun`), each error one line."""

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist


class Failed(RuntimeError):
    """The run failed, as opposed to the input being wrong: exit code 1 instead of 2."""


def run(main: Callable, parse: Callable) -> None:
    """What a script does when it is called: `main(parse(argv))`, each error one line on stderr.

    Exit code 2 for input that is wrong, 1 for a run that failed. TRACEBACK=1 shows the traceback.
    """
    try:
        start_ranks()
        main(parse(sys.argv[1:]))
    except (ValueError, OSError, Failed, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        if os.environ.get("TRACEBACK"):
            raise
        text, code = describe(error)
        print("error: " + " ".join(text.split()), file=sys.stderr, flush=True)
        if dist.is_initialized():  # other ranks may never reach a clean shutdown
            os._exit(code)
        sys.exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


def describe(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; --resume goes on from the last checkpoint", 130
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full: try a smaller --micro-batch (--batch stays the same)", 1
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else ""), 2
    return str(error), 1 if isinstance(error, Failed) else 2


def start_ranks() -> None:
    """Joins the other processes if `torchrun` started this one."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*words) -> None:
    """Prints on the first process only."""
    if rank() == 0:
        print(*words, flush=True)


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
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"--device {name} is not to be had here ({reason})") from None
    return chosen
