"""Methods and loop as they are usually written: maps stored, the teacher run to its end."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

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


def make_plain(task: Task, recipe) -> None:
    """Rewrites a method the usual way."""
    nets = [task.net]
    if recipe.method in ("copy", "distill"):
        own = {name: task.loss.keywords[name] for name in ("teacher", "layers")}
        task.loss = partial(transfer_loss, **own, settings=recipe)
        nets.append(own["teacher"])
    for block in (module for net in nets for module in net.modules() if isinstance(module, Block)):
        block.attn = PlainAttention(block.attn)


def transfer_loss(student, images, labels, teacher, layers: Sequence[int], settings):
    """Of attention copy, or of distillation."""
    factors, copies = student.draw_drop_path(len(images)), settings.method == "copy"
    with torch.no_grad():
        theirs = [scores for _, scores in teacher.blockwise(images, factors=factors)]
    given = [scores if copies and i in layers else None for i, scores in enumerate(theirs)]
    tokens, ours = zip(*student.blockwise(images, given, factors), strict=True)
    logits = student.classify(tokens[-1])
    classification = F.cross_entropy(logits, labels, label_smoothing=settings.smoothing)
    if copies:
        return classification, {}
    pairs = [(theirs[i].softmax(-1), ours[i].log_softmax(-1)) for i in layers]
    attention = sum(-(p_t * log_p).sum(-1).mean() for p_t, log_p in pairs)
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
        loss.item()  # to stop if it is not finite: each step waits for it
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip)
        else:  # only for the log
            nn.utils.get_total_norm([p.grad for p in self.net.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            for average, p in zip(self.average.parameters(), self.net.parameters(), strict=True):
                average.mul_(self.settings.ema).add_(p.detach(), alpha=1 - self.settings.ema)
