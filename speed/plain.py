"""Methods and loop as they are usually written: maps stored, the teacher run to its end."""

from launch import Failed

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attention import OWN, Attended, Attention
from learner import Learner, parameter_groups
from settings import Settings
from train import Task
from vit import Block


class PlainAttention(nn.Module):
    """Attention that stores its map: scores (B, H, N, N) go out, and may come in, as a bias."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.heads, self.qkv, self.proj = attention.heads, attention.qkv, attention.proj

    def forward(self, x: Tensor, given: Attended = OWN, _=None) -> tuple[Tensor, Attended]:
        q, k, v = rearrange(self.qkv(x), "b n (p h d) -> p b h n d", p=3, h=self.heads)
        scores = q * q.shape[-1] ** -0.5 @ k.mT if given.bias is None else given.bias
        y = scores.softmax(dim=-1) @ v
        return self.proj(rearrange(y, "b h n d -> b n (h d)")), Attended(bias=scores)


def plain(net: nn.Module) -> nn.Module:
    """The same net with attention that stores its maps."""
    for module in net.modules():
        if isinstance(module, Block):
            module.attn = PlainAttention(module.attn)
    return net


def plain_task(task: Task, settings: Settings) -> Task:
    """The same method, written the usual way."""
    plain(task.net)
    if task.name not in ("copy", "distill"):
        return task
    teacher, layers = plain(task.loss.keywords["teacher"]), task.loss.keywords["layers"]
    loss = {"copy": copy_loss, "distill": distill_loss}[task.name]
    task.loss = partial(loss, teacher=teacher, layers=layers, settings=settings)
    return task


def copy_loss(student, images, labels, teacher, layers: Sequence[int], settings: Settings):
    mask = student.draw_drop_path_mask(len(images), images.device)
    with torch.no_grad():
        theirs = [used for _, used in teacher.run(images, drop_path_mask=mask)]
    given = [used if i in layers else None for i, used in enumerate(theirs)]
    logits = student(images, given, mask)
    return {"class": F.cross_entropy(logits, labels, label_smoothing=settings.smoothing)}, {}


def distill_loss(student, images, labels, teacher, layers: Sequence[int], settings: Settings):
    mask = student.draw_drop_path_mask(len(images), images.device)
    with torch.no_grad():
        theirs = [used.bias for _, used in teacher.run(images, drop_path_mask=mask)]
    tokens, ours = zip(*student.run(images, drop_path_mask=mask), strict=True)
    pairs = [(theirs[i].softmax(-1), ours[i].bias.log_softmax(-1)) for i in layers]
    attention = sum(-(p_t * log_p).sum(-1).mean() for p_t, log_p in pairs)
    logits = student.classify(tokens[-1])
    return {
        "class": F.cross_entropy(logits, labels, label_smoothing=settings.smoothing),
        "attention": settings.attention_weight * attention,
    }, {}


class PlainLearner(Learner):
    """The optimiser as it comes, the average tensor by tensor, the loss read at each step."""

    def __init__(self, net: nn.Module, loss: Callable, settings: Settings, steps: int):
        super().__init__(net, loss, settings, steps)
        groups = parameter_groups(net, settings.weight_decay, settings.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2))

    def learn(self, images: Tensor, labels: Tensor, rate: float) -> None:
        with self.autocast:
            loss = sum(self.step(images, labels)[0].values())
        loss.backward()
        if not math.isfinite(loss.item()):
            raise Failed("the loss is not finite")
        nn.utils.get_total_norm([p.grad for p in self.net.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            with torch.no_grad():
                for average, p in zip(
                    self.average.parameters(), self.net.parameters(), strict=True
                ):
                    average.mul_(self.settings.ema).add_(p, alpha=1 - self.settings.ema)
