"""The methods against their definitions, written out in full."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attention_copy
import attention_distill
import finetune
import learner
import pretrain
import vit
from attention_loss import attention_loss_plain
from settings import Settings


def make(seed, drop_path=0.0, **changes):
    torch.manual_seed(seed)
    shape = dict(image_size=12, patch=3, channels=1, classes=10, dim=32, depth=4, heads=4)
    return vit.ViT(vit.Config(**shape | changes), drop_path)


def traces(net, images):
    """What each block attended with."""
    return [attended for _, attended in net.run(images)]


def test_distillation_sums_named_terms_and_reaches_only_the_layers_asked_for():
    student, teacher = make(0), make(1).eval().requires_grad_(False)
    images, labels = torch.randn(3, 1, 12, 12), torch.tensor([1, 2, 3])
    settings = Settings(attention_weight=2.5, share_drops=True, heads="", smoothing=0.1)
    terms, diagnostics = attention_distill.loss(student, images, labels, teacher, [0, 2], settings)
    expected = F.cross_entropy(student(images), labels, label_smoothing=0.1)
    torch.testing.assert_close(terms["class"], expected)
    ours, theirs = traces(student, images), traces(teacher, images)
    losses = [attention_loss_plain(ours[i], theirs[i]) for i in (0, 2)]
    floors = [attention_loss_plain(theirs[i], theirs[i]) for i in (0, 2)]
    torch.testing.assert_close(terms["attention"], 2.5 * sum(losses))
    torch.testing.assert_close(diagnostics["kl"], (sum(losses) - sum(floors)).detach() / 2)
    terms["attention"].backward()
    reached = [block.attn.qkv.weight.grad is not None for block in student.blocks]
    assert reached == [True, True, True, False] and student.head.weight.grad is None


def test_a_twin_of_the_teacher_has_no_divergence():
    student, teacher = make(0), make(0).requires_grad_(False)
    images, settings = (
        torch.randn(3, 1, 12, 12),
        Settings(attention_weight=1, share_drops=True, heads="", smoothing=0),
    )
    _, found = attention_distill.loss(
        student, images, torch.tensor([1, 2, 3]), teacher, [0, 3], settings
    )
    assert found["kl"].abs() < 1e-6 and not found["kl"].requires_grad


def test_students_begin_alike_and_not_as_their_teacher_began():
    """Of one seed: so that rows are paired, and nothing is shared that is not transferred."""
    teacher = pretrain.task(pretrain.parse(["--seed", "3"])).net.encoder.state_dict()
    scratch, copied, distilled = (
        script.task(script.parse(["--seed", "3", *more])).net.state_dict()
        for script, more in (
            (finetune, ["--teacher", "none"]), (attention_copy, []), (attention_distill, [])
        )
    )  # fmt: skip
    for name, value in scratch.items():
        assert torch.equal(value, copied[name]) and torch.equal(value, distilled[name])
        if value.ndim > 1 and not name.startswith("head"):
            assert not torch.equal(value, teacher[name]), name


def test_teacher_and_student_share_drop_path_masks_or_not():
    images, layers = torch.randn(64, 1, 12, 12), [0, 1, 2, 3]
    student, teacher = make(0, drop_path=0.9).train(), make(0).eval()
    for share in (True, False):
        torch.manual_seed(5)
        logits = attention_copy.predict(student, images, teacher, layers, share)
        torch.manual_seed(5)
        mask = student.draw_drop_path_mask(64, "cpu")
        theirs = list(teacher.queries_keys(images, layers, mask if share else None))
        torch.testing.assert_close(logits, student(images, theirs, mask))
        own = student(
            images, drop_path_mask=mask
        )  # the teacher is its twin: it agrees if it drops the same
        assert torch.allclose(logits, own, atol=1e-5) == share


def test_mae_does_not_see_masked_patches_and_is_judged_on_them_alone():
    torch.manual_seed(0)
    encoder = vit.ViT(vit.Config(12, 3, 1, 0, dim=32, depth=2, heads=4))
    mae = pretrain.MAE(encoder, mask_ratio=0.75, dim=16, depth=1, heads=2)
    images = torch.randn(6, 1, 12, 12)

    def at_seed(x):
        torch.manual_seed(1)
        return mae(x)

    reconstructed, mask = at_seed(images)
    assert (
        mask.sum(1).eq(12).all() and not mask.eq(mask[0]).all()
    )  # 12 of 16, different in each image
    masked = mask.view(6, 1, 4, 4).repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(at_seed(images + 100 * masked)[0], reconstructed)
    assert not torch.allclose(at_seed(images + 1 - masked)[0], reconstructed)

    torch.manual_seed(1)
    value = pretrain.loss(mae, images, None)[0]["pixels"]
    patches = F.unfold(images, 3, stride=3).mT  # (B, N, 9)
    deviation = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    target = (patches - patches.mean(-1, keepdim=True)) / deviation
    errors = [
        F.mse_loss(reconstructed[b, i], target[b, i])
        for b in range(6)
        for i in range(16)
        if mask[b, i]
    ]
    torch.testing.assert_close(value, torch.stack(errors).mean())


def test_sincos_positions_are_waves_of_x_and_then_of_y():
    table = pretrain.sincos(3, 16)[0].numpy()
    assert not table[0].any()
    for y in range(3):
        for x in range(3):
            rates = [10000 ** (-i / 4) for i in range(4)]
            waves = [f(axis * rate) for axis in (x, y) for f in (np.sin, np.cos) for rate in rates]
            np.testing.assert_allclose(table[1 + 3 * y + x], waves, atol=1e-6)


def test_layer_decay_and_weight_decay_reach_the_right_parameters():
    net = make(0)
    groups = learner.parameter_groups(net, weight_decay=0.1, layer_decay=0.5)
    found = {id(p): (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = {name: found[id(p)] for name, p in net.named_parameters()}
    assert named["head.weight"] == (1.0, 0.1) and named["head.bias"] == (1.0, 0.0)
    assert named["fc_norm.weight"] == (1.0, 0.0)
    assert named["blocks.3.attn.qkv.weight"] == (0.5, 0.1)  # MAE's: one notch below the head
    assert named["blocks.0.mlp.fc1.weight"] == (0.5**4, 0.1)
    assert named["patch_embed.proj.weight"] == (0.5**5, 0.1)
    assert named["pos_embed"] == named["cls_token"] == (0.5**5, 0.0)
    mae = pretrain.MAE(make(0, classes=0), mask_ratio=0.75, dim=16, depth=1, heads=2)
    layers = {name: mae.layer_of(name) for name, _ in mae.named_parameters()}
    assert layers["encoder.blocks.3.attn.qkv.weight"] == 4 and layers["encoder.cls_token"] == 0
    assert layers["decoder_blocks.0.attn.qkv.weight"] == layers["mask_token"] == 5


def test_learning_rate_warms_up_and_falls_as_half_a_cosine():
    rates = [learner.learning_rate(i, 110, 10, 2.0, 0.5) for i in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=0.5)
    for rate in rates[10:]:
        assert rate == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        reference.step()


def test_average_of_weights_forgets_its_start_and_then_follows_the_decay():
    average, net = make(0), make(1)
    expected = [p.clone() for p in average.parameters()]
    for step in range(1, 40):
        learner.update_average(average, net, 0.6, step)
        decay = min(0.6, (1 + step) / (10 + step))
        pairs = zip(expected, net.parameters(), strict=True)
        expected = [decay * e + (1 - decay) * p for e, p in pairs]
    for a, e in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(a, e)
