"""Changed transfers: without their change they are the methods; each change does what it says."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import attention_copy
import attention_distill
import data
import finetune
import pretrain
from study import lenders, variants
from teachers import bundled, find
from teachers.load import open_model, read_checkpoint
from tests.infra.test_data import make_cifar
from vit import QK, attend

FEW = ["--data", "digits", "--device", "cpu", "--num-labels", "20", "--batch", "10"]
TEACHER = str(bundled.BUNDLED / "digits.pt")


@pytest.fixture
def batch():
    return torch.randn(6, 1, 12, 12), torch.randint(10, (6,))


def make(script, teacher, *argv):
    settings = script.parse([*FEW, "--teacher", teacher, *argv])
    dataset = data.load(settings)
    return script.task(settings, dataset, find.find_teacher(settings, dataset))


def compute_gradients(task, batch):
    torch.manual_seed(0)  # the same branches are dropped
    task.net.train().zero_grad()
    total, shown = task.loss(task.net, *batch)
    total.backward()
    return total, shown, {name: p.grad for name, p in task.net.named_parameters()}


@pytest.mark.parametrize("script", [attention_copy, attention_distill])
def test_without_a_change_it_is_the_method(script, batch):
    argv = ["--layers", ":3", "--drop-path", "0.5"]
    method = make(script, TEACHER, *argv)
    variant = make(variants, TEACHER, *argv, "--how", script.Settings.method)
    for i in (0, 2):
        assert_close(compute_gradients(method, batch)[i], compute_gradients(variant, batch)[i])
    assert_close(*(task.predict(task.net.eval(), batch[0]) for task in (method, variant)))


def test_the_teachers_weights_with_the_teachers_maps_are_at_first_the_teacher(batch):
    tasks = make(variants, TEACHER, "--start", "teacher"), make(finetune, TEACHER)
    assert_close(*(task.predict(task.net.eval(), batch[0]) for task in tasks))


@pytest.mark.parametrize("part", ["q", "k", "v", "qkv"])
@torch.no_grad()
def test_of_what_is_lent_the_rest_is_the_students(part, batch):
    task, lender = make(variants, TEACHER, "--lend", part), open_model(TEACHER).net
    student, seen = task.net.eval(), []
    student.blocks[0].attn.proj.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    task.predict(student, batch[0])
    blocks = [(net.blocks[0], net.embed(batch[0])) for net in (student, lender)]
    own, lent = (block.attn.project(block.norm1(x)) for block, x in blocks)
    q, k, v = (lent[i] if name in part else own[i] for i, name in enumerate("qkv"))
    assert_close(seen[0], attend(QK(q, k), v).transpose(1, 2).flatten(2))


@torch.no_grad()
def test_mean_maps_are_the_mean_of_maps_and_other_maps_those_of_other_images(batch):
    layers, net = range(4), open_model(TEACHER).net
    other, mean = (
        make(variants, TEACHER, "--bank", "70", "--maps", maps).predict.keywords["teacher"]
        for maps in ("other", "mean")
    )
    maps = [qk.map() for _, qk in net.blockwise(other.bank)]
    for qk, p in zip(mean.lend(batch[0], layers), maps, strict=True):
        assert_close(qk.map(), p.mean(dim=0).expand(6, -1, -1, -1), rtol=1e-4, atol=1e-6)
    for qk, p in zip(other.lend(batch[0], layers), maps, strict=True):
        assert_close(qk.map(), p[:6])
    with torch.enable_grad():  # in training they are drawn
        drawn = [next(other.lend(batch[0], layers)).q.sum(dim=(1, 2, 3)) for _ in range(5)]
    assert len({tuple(sums.tolist()) for sums in drawn}) > 1


def test_fixed_maps_are_what_they_are_called():
    net = open_model(TEACHER).net
    assert_close(lenders.make_uniform_map(net), torch.full((1, 4, 17, 17), 1 / 17))
    expected = torch.eye(17)[9].expand(1, 4, 17, -1)  # the class token, then 4 x 4 patches
    assert_close(lenders.make_centre_map(net), expected)
    torch.manual_seed(1)
    p = lenders.draw_impulse_map(net)
    assert_close(p.sum(dim=-1), torch.ones(1, 4, 17))
    for head in p[0]:
        steps = []
        for query in (6, 7, 10, 11):  # patches with neighbours on all sides, of 4 x 4
            key = head[query].argmax().item()
            steps.append(((key - 1) // 4 - (query - 1) // 4, (key - 1) % 4 - (query - 1) % 4))
        assert len(set(steps)) == 1 and max(map(abs, steps[0])) <= 1


def test_the_loss_of_features_against_its_formula(batch):
    features, expected = make(variants, TEACHER, "--how", "features", "--layers", "1:3"), 0.0
    net = open_model(TEACHER).net
    _, shown, _ = compute_gradients(features, batch)
    traces = [[x for x, _ in vit.blockwise(batch[0])] for vit in (features.net, net)]
    for pair in list(zip(*traces, strict=True))[1:3]:
        x, y = (x - x.mean(dim=-1, keepdim=True) for x in pair)
        x, y = (z / (z.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() for z in (x, y))
        expected += (x - y).square().mean().item()
    assert shown["other"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", variants.LOSSES)
def test_losses_of_maps_against_their_definitions(loss):
    torch.manual_seed(0)
    ours, theirs = (QK(*torch.randn(2, 3, 4, 5, 8, dtype=torch.float64)) for _ in range(2))
    p, q = ours.map(), theirs.map()
    scores = [qk.scores() for qk in (ours, theirs)]
    s, t = (x - x.mean(dim=-1, keepdim=True) for x in scores)
    m = (p + q) / 2
    expected = {
        "cross-entropy": -(q * p.log()).sum(-1).mean(),
        "jensen-shannon": ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)).mean() / 2,
        "squared": (p - q).square().sum(-1).mean(),
        "scores": (s - t).square().mean(),
    }
    assert_close(variants.compare(ours, theirs, loss), expected[loss])
    if loss != "cross-entropy":
        assert_close(variants.compare(theirs, ours, loss), expected[loss])
        assert variants.compare(ours, ours, loss).abs() < 1e-9
    q = ours.q.float().requires_grad_()
    sharp, theirs = QK(100 * q, ours.k.float()), QK(*(x.float() for x in theirs[:2]))
    variants.compare(sharp, theirs, loss).backward()
    assert q.grad.isfinite().all()  # though some of its map is 0


def test_what_is_beside_a_student_is_used_for_nothing(batch, tmp_path):
    argv = ["--layers", ":3", "--drop-path", "0.5", "--how"]
    free = make(variants, TEACHER, *argv, "beside", "--attention-weight", "0")
    held = make(variants, TEACHER, *argv, "copy-beside", "--attention-weight", "0")
    scratch, copy = make(finetune, "none", *argv[2:4]), make(attention_copy, TEACHER, *argv[:-1])
    for pair in ((free, scratch), (held, copy)):
        found, expected = (compute_gradients(task, batch)[2] for task in pair)
        assert_close({name: found[name] for name in expected}, expected)
        assert_close(*(task.predict(task.net.eval(), batch[0]) for task in pair))
    taught = make(variants, TEACHER, *argv, "beside", "--class-weight", "0")
    moved = compute_gradients(taught, batch)[2]
    assert moved["blocks.1.mlp.fc1.weight"].abs().max() > 0  # tokens are shaped
    assert moved["blocks.2.attn.qkv.weight"] is None or not moved["blocks.2.attn.qkv.weight"].any()
    assert moved["beside.2.weight"].any()
    torch.save(taught.export(taught.net), tmp_path / "model.pt")
    assert_close(open_model(tmp_path / "model.pt").net(batch[0]), taught.net.eval()(batch[0]))


def test_the_cell_of_a_pointer_is_read_off_its_picture(tmp_path, monkeypatch):
    argv = [*make_cifar(tmp_path, monkeypatch, 400)[1], "--data", "scenes-cifar10"]  # in colour
    settings = variants.parse([*argv, "--device", "cpu", "--teacher", "none", "--how", "pixels"])
    task = variants.task(settings, data.load(settings))
    images, cells = next(data.load(replace(settings, label="cell"), False).test.in_order(64))
    pixels = pretrain.patchify(task.net.normalise(images), 8)[torch.arange(64), cells]
    guess, net = torch.randn(64, 192), task.net.eval()
    net.beside.forward = lambda _: guess
    assert_close(task.loss(net, images, cells * 0)[1]["other"], (guess - pixels).square().mean())


def test_scratch_is_read_at_the_centre():
    argv = ["--data", "scenes", "--device", "cpu", "--teacher", "none", "--how", "centre"]
    task = variants.task(settings := variants.parse(argv), data.load(settings))
    images, labels = next(task.data.train.epoch(0))
    one = task.net.classify(task.net.forward_features(images)[:, [0, 5]])  # class token, one cell
    assert_close(task.predict(task.net, images), one)
    assert_close(task.loss(task.net, images, labels)[0], nn.functional.cross_entropy(one, labels))


def test_a_probe_trains_a_head_on_what_the_teacher_sees(tmp_path):
    argv = ["--how", "probe", "--epochs", "2", "--out", str(tmp_path)]
    variants.main(variants.parse([*FEW, "--teacher", TEACHER, *argv]))
    before, after = (read_checkpoint(path).weights for path in (TEACHER, tmp_path / "model.pt"))
    for name in after.keys() - {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}:
        assert_close(after[name], before[name], rtol=0, atol=0)
    assert after["head.weight"].abs().max() > 1e-3


def test_what_was_lent_a_fixed_map_is_not_taken_for_a_vit_of_its_own(tmp_path):
    argv = ["--maps", "uniform", "--epochs", "1", "--out", str(tmp_path)]
    variants.main(variants.parse([*FEW, "--teacher", TEACHER, *argv]))
    with pytest.raises(ValueError, match="holds no ViT"):
        open_model(tmp_path / "model.pt")


@pytest.mark.parametrize("argv", [
    "--start teacher", "--how probe --maps mean", "--how distill --lend v", "--lend v --maps mean",
    "--lend v --layers 0 --teacher-layers 1", "--how pixels", "--how centre", "--maps tokens",
    "--how features --loss squared", "--how probe --bank 9", "--how probe --attention-weight 9",
    "--how pixels --data scenes --patch 4", "--how centre --data scenes --patch 4",
])  # fmt: skip
def test_changes_that_cannot_be_are_refused(argv):
    with pytest.raises(ValueError, match="--"):
        make(variants, "random", *argv.split())
