"""How many images fit in memory at once."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from common.launch import Failed, is_out_of_memory


def find_micro_batch(task, compute: Callable) -> int:
    """The largest share of a process' images whose gradients fit, by halving; equal on all ranks.

    `compute(images, labels)` returns the loss of a train.Task. Failed if one image does not fit.
    """
    net, data = task.net, task.data
    size, device = data.train.batch // data.train.world, next(net.parameters()).device
    images = torch.zeros(size, data.channels, data.image_size, data.image_size, device=device)
    labels, fits = images.new_zeros(size).long(), images.new_zeros(1)
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
