"""The methods against their definitions, written out in full."""

import math
from argparse import Namespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attention_copy
import attention_distill
import finetune
import pretrain
import train
import vit


def make(seed, **changes):
    torch.manual_seed(seed)
    return vit.ViT(**dict(image_size=12, patch=3, channels=1, classes=10, dim=32, depth=4, heads=4) | changes)


def test_attention_loss_is_the_cross_entropy_between_maps_summed_over_pairs():
    q, k, q_t, k_t = torch.randn(4, 2, 3, 5, 8, dtype=torch.float64)
    k_t = k_t * 2
    total = 0.0
    for b in range(2):
        for h in range(3):
            for i in range(5):
                ours = [math.exp(q[b, h, i] @ k[b, h, j] / math.sqrt(8)) for j in range(5)]
                theirs = [math.exp(q_t[b, h, i] @ k_t[b, h, j] / math.sqrt(8)) for j in range(5)]
                total -= sum(t / sum(theirs) * math.log(o / sum(ours)) for o, t in zip(ours, theirs, strict=True))
    assert attention_distill.attention_loss((q, k), (q_t, k_t)).item() == pytest.approx(total / (2 * 3 * 5), rel=1e-12)


def test_attention_loss_has_the_gradient_that_theory_gives():
    """d CE / d q = scale (P_S - P_T) K_S and d CE / d k = scale (P_S - P_T)' Q_S, over the number of rows averaged."""
    q, k = torch.randn(2, 2, 3, 5, 8, dtype=torch.float64).requires_grad_().unbind()
    q_t, k_t = torch.randn(2, 2, 3, 5, 16, dtype=torch.float64)  # a wider teacher
    dq, dk = torch.autograd.grad(attention_distill.attention_loss((q, k), (q_t, k_t)), (q, k))
    scale = 8**-0.5
    gap = (q @ k.mT * scale).softmax(-1) - (q_t @ k_t.mT * 0.25).softmax(-1)
    torch.testing.assert_close(dq, scale * gap @ k / (2 * 3 * 5))
    torch.testing.assert_close(dk, scale * gap.mT @ q / (2 * 3 * 5))


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_loss_at_once_is_the_attention_loss(dtype, close):
    """Value and gradients; bfloat16 as it is met in training, under autocast, against float32."""
    q, k, q_t, k_t = (torch.randn(2, 3, 50, d).to(dtype).float() if dtype is torch.bfloat16
                      else torch.randn(2, 3, 50, d, dtype=dtype) for d in (8, 8, 16, 16))  # fmt: skip
    q, k = q.requires_grad_(), k.requires_grad_()
    plain = attention_distill.attention_loss((q, k), (q_t, k_t))
    if dtype is torch.bfloat16:
        with torch.autocast("cpu", dtype):
            once = attention_distill.attention_loss_at_once((q.to(dtype), k.to(dtype)), (q_t.to(dtype), k_t.to(dtype)))
    else:
        once = attention_distill.attention_loss_at_once((q, k), (q_t, k_t))
    assert once.dtype == plain.dtype and abs(once / plain - 1) < close
    for ours, theirs in zip(torch.autograd.grad(3 * once, (q, k)), torch.autograd.grad(3 * plain, (q, k)), strict=True):
        assert (ours - theirs).norm() < close * theirs.norm()


def test_attention_loss_at_once_keeps_no_map():
    kept = []
    q, k, q_t, k_t = torch.randn(4, 2, 3, 50, 8).unbind()
    for loss in (attention_distill.attention_loss, attention_distill.attention_loss_at_once):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss((q.requires_grad_(), k.requires_grad_()), (q_t, k_t)).backward()
        assert (max(kept) >= 2 * 3 * 50 * 50) == (loss is attention_distill.attention_loss)
        kept.clear()


def test_attention_loss_is_least_where_the_maps_agree():
    q_t, k_t = torch.randn(2, 2, 3, 5, 8)
    p = (q_t @ k_t.mT * 8**-0.5).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    floor = attention_distill.attention_loss((q_t, k_t), (q_t, k_t))
    torch.testing.assert_close(floor, entropy)
    assert attention_distill.attention_loss((q_t + 0.3 * torch.randn_like(q_t), k_t), (q_t, k_t)) > floor


def test_distillation_sums_named_terms_and_reaches_only_the_layers_asked_for():
    student, teacher = make(0), make(1).eval().requires_grad_(False)
    images, labels = torch.randn(3, 1, 12, 12), torch.tensor([1, 2, 3])
    args = Namespace(weight=2.5, share_drops=True, smoothing=0.1)
    terms = attention_distill.loss(student, images, labels, teacher, [0, 2], args)
    logits, ours = student(images)
    _, theirs = teacher(images)
    torch.testing.assert_close(terms["class"], F.cross_entropy(logits, labels, label_smoothing=0.1))
    expected = 2.5 * sum(attention_distill.attention_loss(ours[i], theirs[i]) for i in (0, 2))
    torch.testing.assert_close(terms["attention"], expected)
    terms["attention"].backward()
    reached = [block.attn.qkv.weight.grad is not None for block in student.blocks]
    assert reached == [True, True, True, False] and student.head.weight.grad is None


def test_teacher_and_student_share_drop_path_masks_or_not():
    images = torch.randn(64, 1, 12, 12)
    student, teacher = make(0, drop_path=0.9).train(), make(0).eval()
    for share in (True, False):
        torch.manual_seed(5)
        logits = attention_copy.predict(student, images, teacher, [0, 1, 2, 3], share)
        torch.manual_seed(5)
        keep = student.draw_keep(64, "cpu")
        qk = teacher.look(images, [0, 1, 2, 3], keep if share else None)
        torch.testing.assert_close(logits, student(images, qk, keep)[0])
        own = student(images, keep=keep)[0]  # the teacher is the student's twin: it agrees only if it drops the same
        assert torch.allclose(logits, own, atol=1e-5) == share


def test_mae_does_not_see_hidden_patches_and_is_judged_on_them_alone():
    torch.manual_seed(0)
    encoder = vit.ViT(image_size=12, patch=3, channels=1, classes=0, dim=32, depth=2, heads=4)
    mae = pretrain.MAE(encoder, mask=0.75, dim=16, depth=1, heads=2)
    images = torch.randn(6, 1, 12, 12)

    def at_seed(x):
        torch.manual_seed(1)
        return mae(x)

    painted, mask = at_seed(images)
    assert mask.sum(1).eq(12).all() and not mask.eq(mask[0]).all()  # 12 of 16 hidden, different ones in each image
    hidden = mask.view(6, 1, 4, 4).repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(at_seed(images + 100 * hidden)[0], painted)
    assert not torch.allclose(at_seed(images + 1 - hidden)[0], painted)

    torch.manual_seed(1)
    value = pretrain.loss(mae, images, None)["pixels"]
    patches = F.unfold(images, 3, stride=3).mT  # (B, N, 9)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = [F.mse_loss(painted[b, i], target[b, i]) for b in range(6) for i in range(16) if mask[b, i]]
    torch.testing.assert_close(value, torch.stack(errors).mean())


def test_sincos_positions_are_waves_of_x_and_then_of_y():
    table = pretrain.sincos(3, 16)[0].numpy()
    assert not table[0].any()
    for y in range(3):
        for x in range(3):
            waves = [f(axis / 10000 ** (i / 4)) for axis in (x, y) for f in (np.sin, np.cos) for i in range(4)]
            np.testing.assert_allclose(table[1 + 3 * y + x], waves, atol=1e-6)


def test_layer_decay_and_weight_decay_reach_the_right_parameters():
    net = make(0)
    groups = train.parameter_groups(net, Namespace(layer_decay=0.5, weight_decay=0.1))
    found = {id(p): (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = {name: found[id(p)] for name, p in net.named_parameters()}
    assert named["head.weight"] == (1.0, 0.1) and named["head.bias"] == (1.0, 0.0)
    assert named["fc_norm.weight"] == (1.0, 0.0)
    assert named["blocks.3.attn.qkv.weight"] == (0.5, 0.1)  # MAE's: the last block is one notch below the head
    assert named["blocks.0.mlp.fc1.weight"] == (0.5**4, 0.1)
    assert named["patch_embed.proj.weight"] == (0.5**5, 0.1)
    assert named["pos_embed"] == named["cls_token"] == (0.5**5, 0.0)


def test_learning_rate_warms_up_and_falls_as_half_a_cosine():
    rates = [train.learning_rate(i, 110, 10, 2.0, 0.5) for i in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=2.0), 100, eta_min=0.5)
    for rate in rates[10:]:
        assert rate == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        reference.optimizer.step()
        reference.step()


def test_average_of_weights_forgets_its_start_and_then_follows_the_decay():
    average, net = make(0), make(1)
    expected = [p.clone() for p in average.parameters()]
    for step in range(1, 40):
        train.update_average(average, net, 0.6, step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * p for e, p in zip(expected, net.parameters(), strict=True)]
    for a, e in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(a, e)


class Watched(Namespace):
    read: ClassVar[set] = set()

    def __getattribute__(self, name):
        Watched.read.add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("script, extra", [
    (finetune, []), (finetune, ["--teacher", "none"]), (attention_copy, []), (attention_distill, []), (pretrain, []),
])  # fmt: skip
def test_every_entry_of_a_recipe_and_every_flag_is_read(script, extra, small, teacher, tmp_path):
    """A flag that nobody reads is the published code's worst bug: its --end_layer has no effect."""
    source = [] if script is pretrain else ["--teacher", teacher]
    if script is attention_distill:
        source += ["--layers", "2"]
    if script is pretrain:
        source += ["--decoder-dim", "16"]
    args = Watched(**vars(script.options([*small, "--out", str(tmp_path / "run"), *source, *extra])))
    Watched.read.clear()
    script.main(args)
    on_occasion = {"resume", "overwrite", "skip_unreadable"}  # read only where there is something to do; tested there
    assert set(script.RECIPE) | set(script.FLAGS) <= Watched.read | on_occasion


def test_warm_up_follows_the_number_of_epochs_unless_given():
    usual = finetune.options([])
    half = finetune.options(["--epochs", str(usual.epochs // 2)])
    assert half.warmup == usual.warmup // 2 > 0
    assert finetune.options(["--epochs=90", "--warmup=7"]).warmup == 7


def test_hyper_parameters_come_from_the_column_of_the_data_set():
    for name, column in (("digits", 0), ("cifar100", 1), ("imagenet", 2), ("folder", 2)):
        args = attention_distill.options(["--data", name, "--weight", "9"])
        for key, row in attention_distill.RECIPE.items():
            assert getattr(args, key) == (9.0 if key == "weight" else row[column])
