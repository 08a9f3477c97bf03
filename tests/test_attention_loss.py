"""The distillation loss against its definition in loops, its gradient against theory."""

import math

import pytest
import torch

from attention_distill import attention_loss, compare_maps
from common.fused_loss import fused_attention_loss
from vit import QK


def draw(*widths, dtype=torch.float64, tokens=5):
    """q and k of a student (which learns) and of a teacher, of these widths."""
    shapes = [(2, 3, tokens, width) for width in widths for _ in "qk"]
    q, k, q_t, k_t = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return QK(q.requires_grad_(), k.requires_grad_()), QK(q_t, 2 * k_t)


def fused(student, teacher):
    return fused_attention_loss(*student[:2], *teacher[:2])


def gradients(loss, student):
    return torch.autograd.grad(3 * loss, student[:2])


def test_the_definition_is_the_cross_entropy_between_maps():
    student, teacher = (QK(*(x.detach() for x in side[:2])) for side in draw(8, 8))
    total = 0.0
    for b in range(2):
        for h in range(3):
            for i in range(5):
                ours, theirs = (
                    [math.exp(x.q[b, h, i] @ x.k[b, h, j] / math.sqrt(8)) for j in range(5)]
                    for x in (student, teacher)
                )
                pairs = zip(ours, theirs, strict=True)
                total -= sum(t / sum(theirs) * math.log(o / sum(ours)) for o, t in pairs)
    found = attention_loss(student, teacher).item()
    assert found == pytest.approx(total / (2 * 3 * 5), rel=1e-12)


def test_the_gradient_is_the_difference_of_the_maps():
    """d/dq = (P_S - P_T) k / sqrt(d), d/dk = (P_S - P_T).mT q / sqrt(d), over the rows averaged."""
    student, teacher = draw(8, 16)  # a wider teacher
    gap = (student.map() - teacher.map()) / math.sqrt(8) / (2 * 3 * 5)
    for loss in (attention_loss(student, teacher), fused(student, teacher)[0]):
        dq, dk = gradients(loss, student)
        torch.testing.assert_close(dq, 3 * gap @ student.k)
        torch.testing.assert_close(dk, 3 * gap.mT @ student.q)


@pytest.mark.parametrize("tokens", [50, 300])  # 300: in pieces of one image
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_fused_form_is_the_definition(dtype, close, tokens):
    student, teacher = draw(8, 16, dtype=dtype, tokens=tokens)
    plain, (fast, entropy) = attention_loss(student, teacher), fused(student, teacher)
    assert fast.dtype == plain.dtype and abs(fast / plain - 1) < close
    assert entropy.item() == pytest.approx(attention_loss(teacher, teacher).item(), rel=1e-5)
    assert not entropy.requires_grad
    for ours, theirs in zip(gradients(fast, student), gradients(plain, student), strict=True):
        assert (ours - theirs).norm() < close * theirs.norm()


def test_the_fused_form_in_bf16_as_training_meets_it_is_close_to_float32():
    student, teacher = draw(8, 16, dtype=torch.bfloat16, tokens=50)
    exact = QK(*(x.detach().float().requires_grad_() for x in student[:2]))
    plain = attention_loss(exact, QK(*(x.float() for x in teacher[:2])))
    with torch.autocast("cpu", torch.bfloat16):
        fast, _ = fused(student, teacher)
    assert fast.dtype == torch.float32 and abs(fast / plain - 1) < 2e-2
    for ours, theirs in zip(gradients(fast, student), gradients(plain, exact), strict=True):
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()


def test_the_fused_form_keeps_no_map():
    student, teacher = draw(8, 8, tokens=50)
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    for loss, stores in ((attention_loss, True), (lambda *x: compare_maps(*x)[0], False)):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss(student, teacher).backward()
        assert (max(kept) >= 2 * 3 * 50 * 50) == stores
        kept.clear()


def test_it_is_least_where_the_maps_agree_and_its_floor_is_the_teachers_entropy():
    _, teacher = draw(8, 8)
    p = teacher.map()
    floor, entropy = fused(teacher, teacher)
    torch.testing.assert_close(floor, -(p * p.log()).sum(-1).mean())
    torch.testing.assert_close(floor, entropy)
    other = QK(teacher.q + 0.3 * torch.randn_like(teacher.q), teacher.k)
    cross_entropy, entropy = fused(other, teacher)
    kl = (p * (p / other.map()).log()).sum(-1).mean()
    torch.testing.assert_close(cross_entropy - entropy, kl)
    assert kl > 0


def test_any_map_can_be_distilled():
    """A lent map has the loss, entropy and gradients of the queries and keys that make it."""
    student, teacher = draw(8, 8)
    by_map = compare_maps(student, QK.from_map(teacher.map()))
    by_qk = compare_maps(student, teacher)
    torch.testing.assert_close(by_map, by_qk)
    grads = [gradients(loss, student) for loss, _ in (by_map, by_qk)]
    torch.testing.assert_close(*grads)
