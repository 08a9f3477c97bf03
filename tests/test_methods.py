"""The methods against their definitions, written out in full."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attention_copy
import attention_distill
import data
import finetune
import pretrain
import train
import vit
from attention_distill import attention_loss
from teachers.find import find_teacher


def make(seed, drop_path=0.0, **changes):
    torch.manual_seed(seed)
    shape = dict(image_size=12, patch=3, channels=1, classes=10, dim=32, depth=4, heads=4)
    return vit.ViT(vit.Config(**shape | changes), drop_path)


def make_mae(**changes):
    settings = dict(mask_ratio=0.75, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    config = dict(image_size=12, patch=3, channels=1, classes=0, dim=32, depth=2, heads=4)
    encoder = vit.ViT(vit.Config(**config))
    return pretrain.MAE(encoder, pretrain.Settings(**settings | changes))


def draw_batch(count=3):
    return torch.randn(count, 1, 12, 12), torch.randint(10, (count,))


def list_qk(net, images):
    """What each block attended with."""
    return [qk for _, qk in net.blockwise(images)]


def test_distillation_is_the_sum_of_its_terms_and_reaches_only_the_layers_asked_for():
    student, teacher = make(0), make(1).eval().requires_grad_(False)
    images, labels = draw_batch()
    settings = attention_distill.Settings(attention_weight=2.5, smoothing=0.1)
    total, shown = attention_distill.loss(student, images, labels, teacher, [0, 2], settings)
    expected = F.cross_entropy(student(images), labels, label_smoothing=0.1)
    torch.testing.assert_close(shown["class"], expected)
    ours, theirs = list_qk(student, images), list_qk(teacher, images)
    losses = [attention_loss(ours[i], theirs[i]) for i in (0, 2)]
    floors = [attention_loss(theirs[i], theirs[i]) for i in (0, 2)]
    torch.testing.assert_close(total, expected + 2.5 * sum(losses))
    torch.testing.assert_close(shown["kl"], (sum(losses) - sum(floors)).detach() / 2)
    (total - shown["class"]).backward()
    reached = [block.attn.qkv.weight.grad.any() for block in student.blocks]
    assert reached == [True, True, True, False] and not student.head.weight.grad.any()


def test_a_twin_of_the_teacher_has_no_divergence():
    student, teacher = make(0), make(0).requires_grad_(False)
    settings = attention_distill.Settings()
    _, shown = attention_distill.loss(student, *draw_batch(), teacher, [0, 3], settings)
    assert shown["kl"].abs() < 1e-6 and not shown["kl"].requires_grad


def test_students_begin_alike_and_not_as_their_teacher_began():
    """Of one seed: so that rows are paired, and nothing is shared that is not transferred."""

    def start(script, *more):
        settings = script.parse(["--seed", "3", *more])
        dataset = data.load(settings)
        if script is pretrain:
            return script.task(settings, dataset).net.encoder.state_dict()
        checkpoint = find_teacher(settings, dataset)
        return script.task(settings, dataset, checkpoint).net.state_dict()

    teacher, scratch = start(pretrain), start(finetune, "--teacher", "none")
    others = [start(attention_copy), start(attention_distill)]
    others += [start(attention_copy, "--teacher", "random")]
    for name, value in scratch.items():
        assert all(torch.equal(value, other[name]) for other in others)
        if value.ndim > 1 and not name.startswith("head"):
            assert not torch.equal(value, teacher[name]), name


def test_teacher_and_student_drop_the_same_branches():
    (images, labels), layers = draw_batch(64), [0, 1, 2, 3]
    student, twin = make(0, drop_path=0.9).train(), make(0).eval().requires_grad_(False)
    torch.manual_seed(5)
    logits = attention_copy.predict(student, images, twin, layers)
    torch.manual_seed(5)
    keep = student.draw_drop_path(64)
    torch.testing.assert_close(logits, student(images, keep=keep))
    unlike = student(images, list(twin.lend(images, layers)), keep)
    assert not torch.allclose(logits, unlike, atol=1e-3)
    settings = attention_distill.Settings()
    _, shown = attention_distill.loss(student, images, labels, twin, layers, settings)
    assert shown["kl"].abs() < 1e-6  # they could not agree if the twin saw other tokens


@pytest.mark.slow
@pytest.mark.parametrize("drop_path", [0.0, 0.2])
@pytest.mark.parametrize("loss, how", [
    (attention_copy.loss, dict(smoothing=0.1)),
    (attention_distill.loss, dict(settings=attention_distill.Settings())),
])  # fmt: skip
def test_a_step_is_traced_as_one_graph(loss, how, drop_path):
    student, teacher = make(0, drop_path), make(1).eval().requires_grad_(False)
    batch, how = draw_batch(), how | dict(teacher=teacher, layers=[0, 2])
    found = []
    for step in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(5)
        total, _ = step(student, *batch, **how)
        total.backward()
        found.append([total, *(p.grad.clone() for p in student.parameters())])
        student.zero_grad()
    torch.testing.assert_close(*found)


def test_mae_does_not_see_masked_patches_and_is_judged_on_them_alone():
    mae, images = make_mae(norm_pix_loss=True), draw_batch(6)[0]

    def at_seed(x):
        torch.manual_seed(1)
        return mae(x)

    reconstructed, mask = at_seed(images)
    assert mask.sum(1).eq(12).all() and not mask.eq(mask[0]).all()  # of 16, others in each image
    masked = mask.view(6, 1, 4, 4).repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(at_seed(images + 100 * masked)[0], reconstructed)
    assert not torch.allclose(at_seed(images + 1 - masked)[0], reconstructed)

    torch.manual_seed(1)
    value, _ = pretrain.loss(mae, images, None)
    patches = F.unfold(images, 3, stride=3).mT  # (B, N, 9)
    deviation = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    target = (patches - patches.mean(-1, keepdim=True)) / deviation
    errors = [
        F.mse_loss(reconstructed[b, i], target[b, i])
        for b, i in mask.nonzero().tolist()
    ]  # fmt: skip
    torch.testing.assert_close(value, torch.stack(errors).mean())


def test_sincos_positions_are_waves_of_x_and_then_of_y():
    table = pretrain.make_sincos(3, 16)[0].numpy()
    assert not table[0].any()
    for y in range(3):
        for x in range(3):
            rates = [10000 ** (-i / 4) for i in range(4)]
            waves = [f(axis * rate) for axis in (x, y) for f in (np.sin, np.cos) for rate in rates]
            np.testing.assert_allclose(table[1 + 3 * y + x], waves, atol=1e-6)


def test_layer_decay_and_weight_decay_reach_the_right_parameters():
    net = make(0)
    groups = train.group_parameters(net, weight_decay=0.1, layer_decay=0.5)
    found = {id(p): (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = {name: found[id(p)] for name, p in net.named_parameters()}
    assert named["head.weight"] == (1.0, 0.1) and named["head.bias"] == (1.0, 0.0)
    assert named["fc_norm.weight"] == (1.0, 0.0)
    assert named["blocks.3.attn.qkv.weight"] == (0.5, 0.1)  # MAE's: one notch below the head
    assert named["blocks.0.mlp.fc1.weight"] == (0.5**4, 0.1)
    assert named["patch_embed.proj.weight"] == (0.5**5, 0.1)
    assert named["pos_embed"] == named["cls_token"] == (0.5**5, 0.0)


def test_learning_rate_warms_up_and_falls_as_half_a_cosine():
    rates = [train.get_learning_rate(i, 110, 10, 2.0, 0.25) for i in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=0.5)
    for rate in rates[10:]:
        assert rate == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        reference.step()


def test_average_of_weights_forgets_its_start_and_then_follows_the_decay():
    settings = finetune.parse(["--teacher", "none", "--ema", "0.6", "--model", "nano"])
    dataset = data.load(settings)
    learner = train.Learner(finetune.task(settings, dataset), settings, steps=40)
    expected = [p.clone() for p in learner.net.parameters()]
    for epoch in range(20):
        for batch in dataset.train.epoch(epoch):
            learner.train_step(*batch, 0.01)
            decay = min(0.6, (1 + learner.done) / (10 + learner.done))
            if learner.done == 1:  # torch's AveragedModel begins with the first weights
                decay = 0.0
            pairs = zip(expected, learner.net.parameters(), strict=True)
            expected = [decay * e + (1 - decay) * p.detach() for e, p in pairs]
    for a, e in zip(learner.average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(a, e)
