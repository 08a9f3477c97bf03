"""One step of training, and all that it changes: weights and their average, optimiser, sums."""

from launch import Failed, out_of_memory, world

import contextlib
import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def learning_rate(step: int, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Linear warm-up, then half a cosine from `peak` down to `floor`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    cosine = math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    return floor + (peak - floor) * 0.5 * (1 + cosine)


def scaled_rates(settings, batch: int) -> tuple[float, float]:
    """The peak and the floor of the learning rate at a batch, in proportion to it.

    Goyal et al. 2017; as MAE and the published code have it.
    """
    scale = batch / settings.lr_batch if settings.lr_batch else 1
    return settings.lr * scale, settings.min_lr * scale


class Step(nn.Module):
    """What DDP and torch.compile wrap: images and labels in, terms and diagnostics out."""

    def __init__(self, net: nn.Module, loss: Callable):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(
        self, images: Tensor, labels: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.loss(self.net, images, labels)


class Learner:
    """The state of training a net with a loss. `steps` is the length of the run.

    Nothing in `learn` waits for the GPU.
    """

    def __init__(self, net: nn.Module, loss: Callable, settings, steps: int):
        self.device = next(net.parameters()).device
        self.net, self.loss, self.settings, self.done = net, loss, settings, 0
        self.micro_batch = settings.micro_batch  # images at a time; 0: all at once
        # Sums over the steps of an epoch: of the terms of the loss, and of what is only watched.
        self.terms, self.diagnostics = {}, {}
        self.average = copy.deepcopy(net).requires_grad_(False) if settings.ema else None
        self.optimizer = torch.optim.AdamW(
            parameter_groups(net, settings.weight_decay, settings.layer_decay),
            lr=settings.lr,
            betas=(0.9, settings.beta2),
            fused=self.device.type in ("cuda", "cpu"),
        )
        fp16 = precision(settings.amp, net) is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.autocast = autocast(settings.amp, net)
        self.step = Step(net, loss)
        if dist.is_initialized():
            self.step = DistributedDataParallel(self.step, gradient_as_bucket_view=True)
        if (mode := compilation(settings.compile, self.device, steps)) != "off":
            self.step.compile(mode="reduce-overhead" if mode == "graphs" else None)

    def turn_to(self, loss: Callable) -> None:
        """From now on with another loss, of the same parameters."""
        getattr(self.step, "module", self.step).loss = loss

    def learn(self, images: Tensor, labels: Tensor, rate: float) -> None:
        """One step of the optimiser, at learning rate `rate`, on this process' share of a batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        size = self.micro_batch or len(images)
        pieces = list(zip(images.split(size), labels.split(size), strict=True))
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1  # which exchanges the sum of the gradients
            with contextlib.nullcontext() if last or world() == 1 else self.step.no_sync():
                self.backward(*piece, share=len(piece[0]) / len(images))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip or math.inf)
        if not self.scaler.is_enabled():  # which skips steps with infinite gradients by itself
            add(self.diagnostics, {"gradient_norm": norm}, 1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.done += 1
        if self.average:
            update_average(self.average, self.net, self.settings.ema, self.done)

    def backward(self, images: Tensor, labels: Tensor, share: float) -> None:
        with self.autocast:
            terms, diagnostics = self.step(images, labels)
        self.scaler.scale(sum(terms.values()) * share).backward()
        add(self.terms, terms, share)
        add(self.diagnostics, diagnostics, share)

    def find_micro_batch(self, share: int, shape: tuple[int, int, int]) -> None:
        """Without --micro-batch: as many images of this process' share as fit, by halves.

        Tried on blank images of a shape; the same on all processes.
        """
        if not self.micro_batch:
            self.micro_batch = self.largest(share, shape)
        if self.settings.compile == "graphs" and self.micro_batch < share:
            raise ValueError(
                f"--compile graphs: a step has several pieces ({self.micro_batch} of {share} images"
                "), whose gradients PyTorch does not add up rightly under CUDA graphs "
                "(pytorch#169545): use --compile on, or a smaller --batch"
            )

    def largest(self, share: int, shape: tuple[int, int, int]) -> int:
        """How many images fit, beside as much memory as AdamW will take."""
        size = share
        trained = [p for p in self.net.parameters() if p.requires_grad]
        moments = [torch.empty_like(p) for p in trained for _ in range(2)]
        images = torch.zeros(share, *shape, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(images.new_zeros(1))  # NCCL takes its memory when it is first used
        while not self.all_fit(images[:size]):
            if size == 1:
                raise Failed(
                    "one image at a time does not fit in memory: choose a smaller --model or "
                    "--image-size"
                )
            size = (size + 1) // 2
        del moments
        return size

    def all_fit(self, images: Tensor) -> bool:
        """Whether every process can compute the gradients of these images at once."""
        fits, labels = torch.ones(1, device=images.device), images.new_zeros(len(images)).long()
        before = [buffer.clone() for buffer in self.net.buffers()]
        try:
            self.differentiate(images, labels)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            fits.zero_()
        self.optimizer.zero_grad()
        for buffer, value in zip(self.net.buffers(), before, strict=True):
            buffer.copy_(value)
        if images.is_cuda:
            torch.cuda.empty_cache()  # NCCL and cuBLAS allocate beside PyTorch
        if dist.is_initialized():
            dist.all_reduce(fits, dist.ReduceOp.MIN)
        return fits.item() == 1

    def differentiate(self, images: Tensor, labels: Tensor) -> None:
        with self.autocast:
            terms, _ = self.loss(self.net, images, labels)
        sum(terms.values()).backward()

    def parts(self) -> dict:
        """What has a state of its own."""
        parts = {"net": self.net, "optimizer": self.optimizer, "scaler": self.scaler}
        return parts | ({"average": self.average} if self.average else {})

    def state(self) -> dict:
        states = {name: part.state_dict() for name, part in self.parts().items()}
        return states | dict(step=self.done, terms=self.terms, diagnostics=self.diagnostics)

    def restore(self, state: dict) -> None:
        for name, part in self.parts().items():
            if state[name] or part is not self.scaler:  # that of other hardware is empty
                part.load_state_dict(state[name])
        self.done = state["step"]
        for sums in ("terms", "diagnostics"):
            setattr(self, sums, {k: v.to(self.device) for k, v in state[sums].items()})


def add(sums: dict[str, Tensor], values: dict[str, Tensor], share: float) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value.detach() * share


def parameter_groups(net: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Weight decay for matrices only; layer decay: a factor per layer below the head."""
    groups, layer_of = {}, getattr(net, "layer_of", None)
    if layer_decay < 1 and not layer_of:
        raise ValueError(f"--layer-decay {layer_decay}: only a ViT has layers that are counted")
    for name, p in net.named_parameters():
        if p.requires_grad:
            scale = layer_decay ** (layer_of("head") - layer_of(name)) if layer_of else 1.0
            bare = p.ndim <= 1 or name.endswith(("pos_embed", "_token", "relative.table"))
            groups.setdefault((scale, 0.0 if bare else weight_decay), []).append(p)
    return [
        dict(params=params, scale=scale, weight_decay=decay)
        for (scale, decay), params in groups.items()
    ]


@torch.no_grad()
def update_average(average: nn.Module, net: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of the weights; of buffers (batch norm's) a copy.

    Young averages follow faster, so that short runs forget their start.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
    for ours, theirs in zip(average.buffers(), net.buffers(), strict=True):
        ours.copy_(theirs)


def precision(amp: str, net: nn.Module) -> torch.dtype | None:
    """The dtype of mixed precision, or None for float32.

    auto is bf16 where the hardware multiplies it (a T4 would only emulate it: fp16 is what it is
    fast in). A net of under a million parameters is bound by calls, not by arithmetic: float32.
    """
    if amp != "auto":
        return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    where = next(net.parameters()).device.type
    if sum(p.numel() for p in net.parameters()) < 1e6:
        return None
    if multiplies_bf16(where):
        return torch.bfloat16
    return torch.float16 if where == "cuda" else None


def multiplies_bf16(where: str) -> bool:
    """Whether a type of device here has bf16 in hardware. (Without, it may be very slow.)"""
    if where == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    about = Path("/proc/cpuinfo")  # on Linux
    return where == "cpu" and about.exists() and "bf16" in about.read_text()


def precision_name(amp: str, net: nn.Module) -> str:
    return str(precision(amp, net) or torch.float32).removeprefix("torch.")


def autocast(amp: str, net: nn.Module):
    """The context of mixed precision: made once, entered at each step."""
    dtype = precision(amp, net)
    where = next(net.parameters()).device.type
    return torch.autocast(where, dtype) if dtype else contextlib.nullcontext()


def compilation(choice: str, where: torch.device, steps: int) -> str:
    """--compile, with auto decided: it takes minutes, which only long runs on a GPU earn back."""
    if choice == "auto":
        return "on" if where.type == "cuda" and steps >= 5000 else "off"
    return choice
