"""Mixed precision and torch.compile: which of them a run uses."""

import contextlib
from pathlib import Path

import torch
from torch import nn
from torch.utils._triton import has_triton


def choose_precision(amp: str, net: nn.Module) -> torch.dtype:
    """The dtype of matrix products. auto: bf16 in hardware, else fp16 on a GPU, else float32."""
    where = next(net.parameters()).device.type
    small = sum(map(torch.numel, net.parameters())) < 1e6  # its time goes into calls, not products
    if amp == "auto":
        fast = "bf16" if has_bf16(where) else "fp16" if where == "cuda" else "off"
        amp = "off" if small else fast
    return {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def has_bf16(where: str) -> bool:
    """Whether a type of device has bf16 in hardware. Emulated, it can be very slow."""
    if where == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    about = Path("/proc/cpuinfo")  # Linux
    return where == "cpu" and about.exists() and "bf16" in about.read_text()


def autocast(amp: str, net: nn.Module):
    """The context of mixed precision."""
    dtype, where = choose_precision(amp, net), next(net.parameters()).device.type
    return contextlib.nullcontext() if dtype is torch.float32 else torch.autocast(where, dtype)


def choose_compilation(choice: str, where: torch.device, steps: int) -> str:
    """--compile, with auto decided. Compiling takes minutes: only long GPU runs earn them back."""
    long = where.type == "cuda" and steps >= 5000 and has_triton()
    return choice if choice != "auto" else "on" if long else "off"
