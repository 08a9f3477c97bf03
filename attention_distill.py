"""Attention distillation: the student learns to look where the teacher looks (Li et al., NeurIPS 2024, section 3).

The student computes its own attention maps P_S. A cross-entropy pulls them to the frozen teacher's maps P_T:

    loss = classification + weight * sum over layers of  mean over images, heads, queries of  - P_T . log P_S

All else the student learns from scratch. After training the teacher is discarded.

    python attention_distill.py                          digits, from a teacher pre-trained here first if need be
    python attention_distill.py --teacher random         the control: maps that nobody learned
    torchrun --nproc_per_node=8 attention_distill.py --data imagenet --data-dir /imagenet --micro-batch 64
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import train
import vit
from attention_copy import pair
from finetune import predict

RECIPE = {  # ImageNet: the README of the authors' code, ViT-L. As shipped that code distils 21 layers: --layers 21
    # name            digits   cifar   imagenet
    "model":         ("micro", "tiny", "large"),
    "patch":         (3,       4,      16),
    "teacher":       ("auto",  "auto", "auto"),
    "layers":        ("3",     "9",    "18", "whose maps are distilled: a count (18), range (6-11), list (0,2,4-7) or all"),
    "weight":        (3.0,     3.0,    3.0, "of the attention loss"),
    "labels":        (100,     0,      0),
    "epochs":        (450,     100,    200),
    "warmup":        (45,      5,      20),
    "batch":         (50,      512,    2048),
    "lr":            (8e-3,    1e-3,   8e-4),
    "min_lr":        (0.0,     1e-6,   1e-6),
    "weight_decay":  (0.05,    0.05,   0.3),
    "beta2":         (0.999,   0.999,  0.95),
    "layer_decay":   (1.0,     1.0,    1.0),
    "clip":          (1.0,     1.0,    0.0),
    "ema":           (0.0,     0.999,  0.9999),
    "drop_path":     (0.0,     0.1,    0.2),
    "share_drops":   (True,    True,   True, "drop path drops the same branches in teacher and student"),
    "crop_area":     (0.0,     0.0,    0.08),
    "randaugment":   (0,       0,      9),
    "erase":         (0.0,     0.25,   0.25),
    "mixup":         (0.0,     0.8,    0.8),
    "cutmix":        (0.0,     1.0,    1.0),
    "smoothing":     (0.0,     0.1,    0.1),
    "eval_every":    (45,      1,      1),
}  # fmt: skip
FLAGS = data.FLAGS | train.FLAGS


# The method ---------------------------------------------------------------------------------------------------------------


def attention_loss(student: vit.QK, teacher: vit.QK) -> Tensor:
    """Cross-entropy of the student's attention maps relative to the teacher's: mean over images, heads and queries.

    Not the KL divergence: its minimum is the entropy of the teacher's maps, not 0. The gradients are the same.
    This is the definition; training calls `attention_loss_at_once`.
    """
    (q, k), (q_t, k_t) = student, teacher  # (B, H, N, d)
    p_t = (q_t * q_t.shape[-1] ** -0.5 @ k_t.mT).softmax(dim=-1)  # (B, H, N, N)
    log_p = (q * q.shape[-1] ** -0.5 @ k.mT).log_softmax(dim=-1)
    return -(p_t * log_p).sum(dim=-1).mean()


class AttentionLossAtOnce(torch.autograd.Function):
    """`attention_loss` and its gradient in one go, so that no (N, N) map is kept until the backward pass.

    Behind softmax, cross-entropy has a gradient that needs nothing but the two maps: with s = q k' / sqrt(d),

        d loss / d s = P_S - P_T,   so   d loss / d q = (P_S - P_T) k / sqrt(d)   and   d loss / d k = (P_S - P_T)' q / sqrt(d)
    """

    @staticmethod
    def forward(ctx, *qk: Tensor) -> Tensor:  # student's q, k, teacher's q, k
        images, heads, tokens, _ = qk[0].shape
        some = images if qk[0].is_cuda else max(1, 2**18 // (heads * tokens**2))  # so many have maps that fit a CPU's cache
        parts = [AttentionLossAtOnce.of(*part) for part in zip(*(x.split(some) for x in qk), strict=True)]
        losses, dq, dk = zip(*parts, strict=True)
        ctx.save_for_backward(torch.cat(dq), torch.cat(dk))
        ctx.rows = images * heads * tokens  # over which the mean is taken
        return sum(losses) / ctx.rows

    @staticmethod
    def of(q: Tensor, k: Tensor, q_t: Tensor, k_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        precise = torch.promote_types(q.dtype, torch.float32)  # the difference of two maps would be too coarse in bf16
        p_t = (q_t * q_t.shape[-1] ** -0.5 @ k_t.mT).softmax(dim=-1, dtype=precise)
        log_p = (q * q.shape[-1] ** -0.5 @ k.mT).log_softmax(dim=-1, dtype=precise)
        loss = -torch.dot(p_t.flatten(), log_p.flatten())
        gap = log_p.exp_().sub_(p_t)  # P_S - P_T
        return loss, gap @ k, gap.mT @ q

    @staticmethod
    def backward(ctx, upstream: Tensor):
        dq, dk = ctx.saved_tensors
        scale = upstream * dq.shape[-1] ** -0.5 / ctx.rows
        return scale * dq, scale * dk, None, None


def attention_loss_at_once(student: vit.QK, teacher: vit.QK) -> Tensor:
    return AttentionLossAtOnce.apply(*student, *teacher)


def loss(student: vit.ViT, images: Tensor, labels: Tensor, teacher: vit.ViT, layers: Sequence[int], args) -> dict[str, Tensor]:
    keep = student.draw_keep(len(images), images.device)  # drop path
    with torch.no_grad():
        theirs = teacher.look(images, layers, keep if args.share_drops else None)
    logits, ours = student(images, keep=keep)
    return {"class": F.cross_entropy(logits, labels, label_smoothing=args.smoothing),
            "attention": args.weight * sum(attention_loss_at_once(ours[i], theirs[i]) for i in layers)}  # fmt: skip


# From the command line to train.fit ---------------------------------------------------------------------------------------


def options(argv: list[str]):
    return train.options(__doc__, RECIPE, FLAGS, argv)


def main(args) -> dict:
    student, teacher, layers, images = pair(args, train.device(args))

    def card(student: vit.ViT) -> dict:
        return {"model": student.state_dict(), "architecture": student.architecture, "classes": images.classes,
                "normalization": images.normalization, "method": "distill"}  # fmt: skip

    return train.fit(student, lambda *step: loss(*step, teacher, layers, args), predict, images, args, "distill", card)


if __name__ == "__main__":
    train.run(main, options)
