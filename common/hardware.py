"""What the hardware allows: mixed precision, torch.compile, and how many images at once."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._triton import has_triton

from common.launch import Failed, is_out_of_memory


def choose_precision(amp: str, net: nn.Module) -> torch.dtype:
    """The dtype of matrix products. auto: bf16 where fast, else fp16 on CUDA, else float32."""
    where = next(net.parameters()).device.type
    if amp == "auto" and sum(map(torch.numel, net.parameters())) < 1e6:
        amp = "off"  # its time goes into calls, not products
    elif amp == "auto":
        amp = "bf16" if has_fast_bf16(where) else "fp16" if where == "cuda" else "off"
    return {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def has_fast_bf16(where: str) -> bool:
    """Whether a type of device multiplies bf16 fast. With AVX-512 alone, float32 is faster."""
    if where == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    about = Path("/proc/cpuinfo")  # Linux
    return where == "cpu" and about.exists() and "amx_bf16" in about.read_text()


def autocast(amp: str, net: nn.Module):
    """The context of mixed precision."""
    dtype, where = choose_precision(amp, net), next(net.parameters()).device.type
    return torch.autocast(where, dtype, enabled=dtype is not torch.float32)


def choose_compilation(choice: str, where: torch.device, steps: int, whole: bool = True) -> str:
    """--compile, with auto decided. Compiling takes minutes: only long GPU runs earn them back.

    `whole`: whether all images of a step fit at once. ValueError for --compile graphs if not.
    """
    if choice == "graphs" and not whole:
        raise ValueError("--compile graphs needs a step in one piece: try on, or less --batch")
    long = where.type == "cuda" and steps >= 5000 and has_triton()
    return choice if choice != "auto" else "on" if long else "off"


def find_micro_batch(task, compute: Callable) -> int:
    """The largest share of a process' images whose gradients fit, by halving; equal on all ranks.

    `compute(images, labels)` returns the loss of a train.Task. Failed if one image does not fit.
    """
    net, data = task.net, task.data
    size, device = data.train.batch // data.train.world, next(net.parameters()).device
    images = torch.zeros(size, len(data.mean), data.image_size, data.image_size, device=device)
    labels, fits = images.new_zeros(size).long(), images.new_zeros(1)
    images, labels = data.train.mix(images, labels) if data.train.mix else (images, labels)
    learned = [p for p in net.parameters() if p.requires_grad]
    copies = 3 + dist.is_initialized()  # AdamW's two, gradients so far, and DDP's
    reserved: list[torch.Tensor] = []
    if dist.is_initialized():
        dist.all_reduce(fits)  # NCCL takes its memory at its first use
    while True:
        before = [*map(torch.clone, net.buffers())]
        try:
            reserved.extend(map(torch.empty_like, learned * copies))
            compute(images[:size], labels[:size]).backward()
            fits.fill_(1)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits.zero_()
        reserved.clear()
        net.zero_grad()
        for buffer, value in zip(net.buffers(), before, strict=True):
            buffer.copy_(value)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # NCCL and cuBLAS allocate beside PyTorch
        if dist.is_initialized():
            dist.all_reduce(fits, dist.ReduceOp.MIN)
        if fits.item():
            return size
        if size == 1:
            raise Failed("one image does not fit in memory: try a smaller --model or --image-size")
        size = (size + 1) // 2
