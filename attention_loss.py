"""The loss of attention distillation: its definition, and the form that keeps no map."""

import torch
from torch import Tensor

from attention import Attended, attention_map, attention_scores


def attention_loss_plain(student: Attended, teacher: Attended) -> Tensor:
    """Cross-entropy of the student's attention maps relative to the teacher's.

    Mean over images, heads and queries, in nats (Li et al., NeurIPS 2024, section 3). Not the KL
    divergence: its least value is the entropy of the teacher's maps, not 0. Same gradients.
    """
    p_t, log_p_s = attention_map(teacher), attention_scores(student).log_softmax(dim=-1)
    return -(p_t * log_p_s).sum(dim=-1).mean()


def attention_loss(student: Attended, teacher: Attended) -> tuple[Tensor, Tensor]:
    """For training: the same loss, and its floor, the entropy of the teacher's maps.

    Their difference is the KL divergence, 0 where the maps agree. The entropy has no gradient.
    """
    if student.bias is None and teacher.bias is None:
        return AttentionLoss.apply(student.q, student.k, teacher.q, teacher.k)
    entropy = torch.special.entr(attention_map(teacher)).sum(dim=-1).mean()
    return attention_loss_plain(student, teacher), entropy.detach()


class AttentionLoss(torch.autograd.Function):
    """The loss and its gradient in one go, so that no (N, N) map is kept until the backward pass.

    The gradient needs only the two maps (S: student, T: teacher). With the student's scores
    s = q @ k.mT / sqrt(d), and before the mean is taken,

        d loss / d s = P_S - P_T, so   d loss / d q = (P_S - P_T) @ k    / sqrt(d)
                                       d loss / d k = (P_S - P_T).mT @ q / sqrt(d)
    """

    @staticmethod
    def forward(ctx, *qk: Tensor) -> tuple[Tensor, Tensor]:  # student's q, k, teacher's q, k
        images, heads, tokens, _ = qk[0].shape
        # Maps of 1 MiB fit the cache of a CPU; cuBLAS takes dot products of less than 2^31 numbers.
        most = 2**18 if qk[0].is_cpu else 2**31 - 1
        at_a_time = max(1, most // (heads * tokens**2))  # images
        pieces = zip(*(x.split(at_a_time) for x in qk), strict=True)
        losses, entropies, dq, dk = zip(*(of_a_piece(*piece) for piece in pieces), strict=True)
        ctx.save_for_backward(torch.cat(dq), torch.cat(dk))
        ctx.rows = images * heads * tokens  # over which the mean is taken
        entropy = sum(entropies) / ctx.rows
        ctx.mark_non_differentiable(entropy)
        return sum(losses) / ctx.rows, entropy

    @staticmethod
    def backward(ctx, upstream: Tensor, _):
        dq, dk = ctx.saved_tensors
        scale = upstream * dq.shape[-1] ** -0.5 / ctx.rows
        return scale * dq, scale * dk, None, None


def of_a_piece(q: Tensor, k: Tensor, q_t: Tensor, k_t: Tensor) -> tuple[Tensor, ...]:
    """Sums of the cross-entropy and of the teacher's entropy; unscaled d loss / dq, d loss / dk."""
    # The difference of two maps would be too coarse in bf16.
    precise = torch.promote_types(q.dtype, torch.float32)
    p_t = attention_scores(Attended(q_t, k_t)).softmax(dim=-1, dtype=precise)
    log_p = attention_scores(Attended(q, k)).log_softmax(dim=-1, dtype=precise)
    loss = -torch.dot(p_t.flatten(), log_p.flatten())
    entropy = torch.special.entr(p_t).sum()
    gap = log_p.exp_().sub_(p_t)  # P_S - P_T
    return loss, entropy, gap @ k, gap.mT @ q
