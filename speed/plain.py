"""Methods and loop as they are usually written: maps stored, the teacher run to its end."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.launch import Failed
from train import Learner, Task, group_parameters
from vit import Attention, Block


class PlainAttention(nn.Module):
    """Attention that stores its map. Scores (B, H, N, N) go out, and may come in."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.heads, self.qkv, self.proj = attention.heads, attention.qkv, attention.proj

    def forward(self, x: Tensor, given: Tensor | None = None):
        q, k, v = rearrange(self.qkv(x), "b n (p h d) -> p b h n d", p=3, h=self.heads)
        scores = q * q.shape[-1] ** -0.5 @ k.mT if given is None else given
        y = scores.softmax(dim=-1) @ v
        return self.proj(rearrange(y, "b h n d -> b n (h d)")), scores


def make_plain(net: nn.Module) -> nn.Module:
    """The same net with attention that stores its maps."""
    for module in net.modules():
        if isinstance(module, Block):
            module.attn = PlainAttention(module.attn)
    return net


def make_plain_task(task: Task, recipe) -> Task:
    """The same method, written the usual way."""
    make_plain(task.net)
    losses: dict[str, Callable] = {"copy": copy_loss, "distill": distill_loss}
    if recipe.method in losses:
        teacher, layers = (task.loss.keywords[name] for name in ("teacher", "layers"))
        how = dict(teacher=make_plain(teacher), layers=layers, settings=recipe)
        task.loss = partial(losses[recipe.method], **how)
    return task


def copy_loss(student, images, labels, teacher, layers: Sequence[int], settings):
    keep = student.draw_drop_path(len(images))
    with torch.no_grad():
        theirs = [scores for _, scores in teacher.blockwise(images, keep=keep)]
    given = [scores if i in layers else None for i, scores in enumerate(theirs)]
    logits = student(images, given, keep)
    return F.cross_entropy(logits, labels, label_smoothing=settings.smoothing), {}


def distill_loss(student, images, labels, teacher, layers: Sequence[int], settings):
    keep = student.draw_drop_path(len(images))
    with torch.no_grad():
        theirs = [scores for _, scores in teacher.blockwise(images, keep=keep)]
    tokens, ours = zip(*student.blockwise(images, keep=keep), strict=True)
    pairs = [(theirs[i].softmax(-1), ours[i].log_softmax(-1)) for i in layers]
    attention = sum(-(p_t * log_p).sum(-1).mean() for p_t, log_p in pairs)
    logits = student.classify(tokens[-1])
    classification = F.cross_entropy(logits, labels, label_smoothing=settings.smoothing)
    return classification + settings.attention_weight * attention, {"class": classification}


class PlainLearner(Learner):
    """The optimizer as it comes, the average tensor by tensor, the loss read at each step."""

    def __init__(self, task: Task, settings):
        super().__init__(task, settings)
        groups = group_parameters(task.net, settings.weight_decay, settings.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, settings.beta2))

    def train_step(self, images: Tensor, labels: Tensor, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss = self.compute_loss(images, labels)
        loss.backward()
        if not math.isfinite(loss.item()):
            raise Failed("the loss is not finite")
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip)
        else:  # only for the log
            nn.utils.get_total_norm([p.grad for p in self.net.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            with torch.no_grad():
                pairs = zip(self.average.parameters(), self.net.parameters(), strict=True)
                for average, p in pairs:
                    average.mul_(self.settings.ema).add_(p, alpha=1 - self.settings.ema)
