"""The methods and their losses against their definitions, written out in full."""

import math

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
from attention_distill import attention_loss, compare_maps
from common import checkpoints
from teachers.find import find_teacher
from teachers.load import read_checkpoint
from vit import QK

SETTINGS = attention_distill.Settings(attention_weight=2.5, smoothing=0.1)


def make(seed, drop_path=0.0, **changes):
    torch.manual_seed(seed)
    shape = dict(image_size=12, patch=3, channels=1, classes=10, dim=32, depth=4, heads=4)
    return vit.ViT(vit.Config(**shape | changes), drop_path)


def draw_batch(count=3):
    return torch.randn(count, 1, 12, 12), torch.randint(10, (count,))


def test_distillation_is_the_sum_of_its_terms_and_reaches_only_the_layers_asked_for():
    student, teacher = make(0), make(1).eval().requires_grad_(False)
    images, labels = draw_batch()
    total, shown = attention_distill.loss(student, images, labels, teacher, [0, 2], SETTINGS)
    expected = F.cross_entropy(student(images), labels, label_smoothing=0.1)
    torch.testing.assert_close(shown["class"], expected)
    ours, theirs = ([qk for _, qk in net.blockwise(images)] for net in (student, teacher))
    losses = [attention_loss(ours[i], theirs[i]) for i in (0, 2)]
    floors = [attention_loss(theirs[i], theirs[i]) for i in (0, 2)]
    torch.testing.assert_close(total, expected + 2.5 * sum(losses))
    torch.testing.assert_close(shown["kl"], (sum(losses) - sum(floors)).detach() / 2)
    (total - shown["class"]).backward()
    reached = [bool(block.attn.qkv.weight.grad.any()) for block in student.blocks]
    assert reached == [True, True, True, False] and not student.head.weight.grad.any()


def test_students_begin_alike_and_not_as_their_teacher_began():
    """Of one seed: so that rows are paired, and nothing is shared that is not transferred."""
    nets, none, random = [], ["--teacher", "none"], ["--teacher", "random"]
    scripts = finetune, attention_copy, attention_copy, attention_distill, pretrain
    for script, more in zip(scripts, (none, [], random, [], []), strict=True):
        settings = script.parse(["--data", "digits", "--seed", "3", *more])
        inputs = [settings, dataset := data.load(settings)]
        inputs += [] if script is pretrain else [find_teacher(settings, dataset)]
        nets.append(script.task(*inputs).net)
    scratch, *others, teacher = (getattr(net, "encoder", net).state_dict() for net in nets)
    for name, value in scratch.items():
        assert all(torch.equal(value, other[name]) for other in others)
        if value.ndim > 1 and not name.startswith("head") and name != "pos_embed":  # sin-cos
            assert not torch.equal(value, teacher[name]), name


def test_mae_does_not_see_masked_patches_and_is_judged_on_them_alone():
    settings = dict(mask_ratio=0.75, decoder_dim=16, decoder_heads=2, norm_pix_loss=True)
    mae = pretrain.MAE(make(0, classes=0), pretrain.Settings(**settings))
    images, _ = draw_batch(6)

    def at_seed(run, *inputs):
        torch.manual_seed(1)
        return run(*inputs)

    reconstructed, mask = at_seed(mae, images)
    assert mask.sum(1).eq(12).all() and not mask.eq(mask[0]).all()  # of 16, others in each image
    masked = mask.view(6, 1, 4, 4).repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(at_seed(mae, images + 100 * masked)[0], reconstructed)
    assert not torch.allclose(at_seed(mae, images + 1 - masked)[0], reconstructed)
    for image, found, hidden in zip(images, reconstructed, mask.bool(), strict=True):
        seen = (~hidden).nonzero().T  # (1, visible)
        x = mae.encoder.embed(image[None])[:, [0, *(1 + seen[0])]]
        for block in mae.encoder.blocks:
            x, _ = block(x)
        places = mae.mask_token.repeat(1, 17, 1)
        places[0, [0, *(1 + seen[0])]] = mae.decoder_embed(mae.encoder.fc_norm(x))[0]
        x, _ = mae.decoder_blocks[0](places + mae.decoder_pos_embed)
        torch.testing.assert_close(found, mae.decoder_pred(mae.decoder_norm(x))[0, 1:])
    patches = F.unfold(images, 3, stride=3).mT  # (B, N, 9)
    deviation = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = reconstructed - (patches - patches.mean(-1, keepdim=True)) / deviation
    expected = torch.stack([errors[b, i] for b, i in mask.nonzero().tolist()]).square().mean()
    torch.testing.assert_close(at_seed(pretrain.loss, mae, images, None)[0], expected)


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
    settings = finetune.parse(["--teacher", "none", "--ema", "0.3", "--model", "nano"])
    dataset = data.load(settings)
    learner = train.Learner(finetune.task(settings, dataset), settings)
    expected = []
    for step in range(1, 6):
        learner.train_step(*dataset.train.first(50), 0.01)
        decay = min(0.3, (step - 1) / (8 + step))
        weights = [p.detach().clone() for p in learner.net.parameters()]
        pairs = zip(expected or weights, weights, strict=True)
        expected = [decay * e + (1 - decay) * p for e, p in pairs]
        torch.testing.assert_close(list(learner.average.parameters()), expected)


def draw_qk(*widths, dtype=torch.float64, tokens=5):
    """q and k of a student (which learns) and of a teacher, of these widths."""
    shapes = [(2, 3, tokens, width) for width in widths for _ in "qk"]
    q, k, q_t, k_t = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return QK(q.requires_grad_(), k.requires_grad_()), QK(q_t, 2 * k_t)


def gradients(loss, student):
    return torch.autograd.grad(3 * loss, student[:2])


def assert_close(found, expected, close):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < close * theirs.norm()


def test_the_definition_is_the_cross_entropy_between_maps():
    both, total = [QK(*(x.detach() for x in side[:2])) for side in draw_qk(8, 8)], 0.0
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)):
        scores = [(x.k[b, h] @ x.q[b, h, i] / math.sqrt(8)).tolist() for x in both]
        ours, theirs = ([math.exp(score) for score in of_row] for of_row in scores)
        for o, t in zip(ours, theirs, strict=True):
            total -= t / sum(theirs) * math.log(o / sum(ours)) / (2 * 3 * 5)
    assert attention_loss(*both).item() == pytest.approx(total, rel=1e-12)


def test_the_gradient_is_the_difference_of_the_maps():
    """d/dq = (P_S - P_T) k / sqrt(d), d/dk = (P_S - P_T).mT q / sqrt(d), over the rows averaged."""
    student, teacher = draw_qk(8, 16)  # a wider teacher
    gap = (student.map() - teacher.map()) / math.sqrt(8) / (2 * 3 * 5)
    by_map = compare_maps(student, QK.from_map(teacher.map()))  # any map can be distilled
    by_qk = compare_maps(student, teacher)
    torch.testing.assert_close(by_map, by_qk)
    for loss in (attention_loss(student, teacher), by_map[0], by_qk[0]):
        expected = 3 * gap @ student.k, 3 * gap.mT @ student.q
        torch.testing.assert_close(gradients(loss, student), expected)


@pytest.mark.parametrize("tokens", [50, 300])  # 300: in pieces of one image
@pytest.mark.parametrize("dtype, close", [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2),
])  # fmt: skip
def test_the_fused_form_is_the_definition(dtype, close, tokens):
    student, teacher = draw_qk(8, 16, dtype=dtype, tokens=tokens)
    precise = torch.promote_types(dtype, torch.float32)
    exact = QK(*(x.detach().to(precise).requires_grad_() for x in student[:2]))
    theirs = QK(*(x.to(precise) for x in teacher[:2]))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        fast, entropy = compare_maps(student, teacher)
    plain, floor = attention_loss(exact, theirs), attention_loss(theirs, theirs)
    assert fast.dtype == precise and not entropy.requires_grad
    assert_close([fast, entropy], [plain, floor], close)
    assert_close(gradients(fast, student), gradients(plain, exact), close)


def test_a_teacher_lends_the_maps_of_its_own_pixels():
    """Teacher and student normalise differently, and get the same batch."""
    student, teacher = make(0, mean=(0.25,), std=(0.35,)), make(1, mean=(0.5,), std=(0.2,))
    plain = make(1)  # the teacher's weights, without its normalisation
    images = torch.rand(3, 1, 12, 12)
    own = [qk.map() for _, qk in plain.blockwise((images - 0.5) / 0.2)]
    looks = student.blockwise(images, given=teacher.lend(images, range(4)))
    torch.testing.assert_close([qk.map() for _, qk in looks], own)


def test_a_task_built_in_python_trains_as_the_script_does(tmp_path):
    teacher = checkpoints.export(make(1, mean=(0.5,), std=(0.2,)))
    torch.save(teacher, path := tmp_path / "teacher.pt")
    argv = ["--data", "digits", "--epochs", "1", "--teacher", str(path), "--out"]
    script = attention_copy.main(attention_copy.parse([*argv, str(tmp_path / "script")]))
    settings = attention_copy.parse([*argv, str(tmp_path / "python")])
    task = attention_copy.task(settings, data.load(settings), read_checkpoint(path))
    assert train.fit(task, settings)["loss"] == script["loss"]
    with pytest.raises(ValueError, match="without a teacher's checkpoint"):
        attention_copy.task(settings, task.data)
