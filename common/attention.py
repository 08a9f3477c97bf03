"""The loss of attention distillation, with its gradients, so that no map is kept for them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class MapCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a student's maps (q, k) relative to a teacher's, and the teacher's entropy.

    Inputs are q, k of both: (B, H, N, d), the teacher's of any width, and its bias. Means over
    images, heads and queries, in nats. Before the mean is taken,

    d loss / d scores = P_S - P_T, so   d loss / d q = (P_S - P_T) @ k    / sqrt(d)
                                        d loss / d k = (P_S - P_T).mT @ q / sqrt(d)
    """

    @staticmethod
    def forward(ctx, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        given = [x for x in inputs if x is not None]
        images, heads, tokens, _ = given[0].shape
        # Maps of 1 MiB fit a CPU's cache. cuBLAS takes dot products of less than 2^31 numbers.
        most = 2**18 if given[0].is_cpu else 2**31 - 1
        at_a_time = max(1, most // (heads * tokens**2))  # images
        pieces = zip(*(x.expand(images, -1, -1, -1).split(at_a_time) for x in given), strict=True)
        losses, entropies, dq, dk = zip(*(compute_piece(*piece) for piece in pieces), strict=True)
        ctx.save_for_backward(torch.cat(dq), torch.cat(dk))
        ctx.rows = images * heads * tokens  # over which the mean is taken
        entropy = sum(entropies) / ctx.rows
        ctx.mark_non_differentiable(entropy)
        return sum(losses) / ctx.rows, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, _):
        dq, dk = ctx.saved_tensors
        scale = upstream * dq.shape[-1] ** -0.5 / ctx.rows
        return scale * dq, scale * dk, None, None, None


def compare_maps(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """attention_distill.attention_loss of two vit.QK, and the teacher's entropy."""
    assert ours.bias is None, "a student computes its maps from queries and keys alone"
    return MapCrossEntropy.apply(ours.q, ours.k, *theirs)


def compute_piece(q: Tensor, k: Tensor, q_t: Tensor, k_t: Tensor, bias: Tensor | None = None):
    """Sums of the cross-entropy and of the teacher's entropy; unscaled d loss / dq, d loss / dk."""
    precise = torch.promote_types(q.dtype, torch.float32)  # bf16 is too coarse for a difference
    theirs = (q_t * q_t.shape[-1] ** -0.5) @ k_t.mT
    theirs = theirs if bias is None else theirs + bias
    p_t = theirs.softmax(dim=-1, dtype=precise)
    log_p = ((q * q.shape[-1] ** -0.5) @ k.mT).log_softmax(dim=-1, dtype=precise)
    loss = -torch.dot(p_t.flatten(), log_p.flatten())
    entropy = torch.special.entr(p_t).sum()
    gap = log_p.exp_().sub_(p_t)  # P_S - P_T
    return loss, entropy, gap @ k, gap.mT @ q
