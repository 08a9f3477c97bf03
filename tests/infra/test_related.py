"""The related systems: each loss against its formula, and against what it must be."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import data
import ensemble
import finetune
import related.integrated_gradients as ig
import vit
from common import checkpoints
from related import activations, attndistill, linear_attention, reminders, scenes
from related.wide_resnet import WideResNet
from teachers.load import open_model

SHORT, FEW = ["--epochs", "2", "--warmup", "0"], "--num-labels 40 --batch 20"
LABELS = torch.tensor([1, 2, 3, 4])
DIGITS = data.Data([*"0123456789"], 12, (0.25,), (0.35,))


@pytest.fixture(autouse=True)
def images():
    torch.manual_seed(0)
    return torch.randn(4, 1, 12, 12)


def make_vit():
    torch.manual_seed(1)
    return vit.ViT(vit.Config(12, 3, 1, 10, 32, 3, 4)).eval()


def test_at_is_as_in_loops_and_kd_is_a_divergence(images):
    maps, both = [], (torch.randn(3, 5, 4, 4), torch.randn(3, 7, 4, 4))  # of other widths
    for image in (image for x in both for image in x):
        active = [sum(c[i, j] ** 2 for c in image) for i in range(4) for j in range(4)]
        maps.append([a / math.sqrt(sum(b**2 for b in active)) for a in active])
    ours, theirs = torch.tensor(maps).split(3)
    assert_close(activations.at(both[0]), ours)
    assert_close(activations.at_loss(*both), ((ours - theirs) ** 2).sum() / (3 * 16))
    logits = torch.randn(2, 3, 10)
    q, p = (logits / 4).softmax(-1)
    found = activations.kd_loss(*logits, activations.parse([]))
    assert_close(found, (p * (p / q).log()).sum() * 16 / 3)
    net, own = WideResNet("teacher", DIGITS).eval(), activations.parse(["--kd-weight", "0.3"])
    total, _ = activations.loss(net, images, LABELS, net, own)  # its own teacher
    alone, _ = activations.loss(net, images, LABELS, None, own)
    assert_close(total, 0.7 * alone, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_contributions_of_pixels_add_up_to_the_difference_of_outputs(images):
    """Completeness (Sundararajan et al. 2017, section 3). For a linear net: x times weight."""
    net, black = WideResNet("small", DIGITS).eval(), torch.full((1, 1, 1, 1), -0.7)
    found = ig.integrate_gradients(net, images, LABELS, black, 400)
    difference = (net(images) - net(black.expand_as(images))).gather(1, LABELS[:, None])[:, 0]
    assert_close(found.sum(dim=(1, 2, 3)), difference, atol=2e-3, rtol=2e-2)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(144, 10))
    found = ig.integrate_gradients(linear, images, LABELS, black, 3)
    assert_close(found, (images - black) * linear[1].weight[LABELS].view(4, 1, 12, 12))


@pytest.mark.parametrize("flags", ["", "--shuffle", "--raw", "--overlay 0"])
def test_each_image_has_its_own_map_or_that_of_another(flags):
    argv = f"--num-labels 50 --bank 1 --overlay 1 {flags}".split()
    settings, net = ig.parse(argv), WideResNet("teacher", DIGITS).eval()
    dataset = data.load(settings)
    bank, labels = dataset.train.first(50)
    maps = ig.make_hint(ig.integrate_gradients(net, bank, labels, torch.zeros(1), settings.path))
    maps = maps[torch.arange(50) - int(flags == "--shuffle")]
    seen = 0.5 * bank + 0.5 * (0.35 * maps + 0.25 if flags == "--raw" else maps)
    for image in next(ig.add_maps(dataset, net, settings).train.epoch(0))[0]:
        which = (bank - image[1:]).abs().sum(dim=(1, 2, 3)).argmin()
        assert torch.equal(image[1:], bank[which])  # what the teacher sees
        assert_close(image[:1], (seen if settings.overlay else bank)[which])


@pytest.mark.parametrize("long", [False, True])
def test_linear_attention_is_that_of_its_maps(long):
    """As by the definition. Long queries like no key's find the mean of values, not 0 / 0."""
    linear = linear_attention.LinearAttention(make_vit().blocks[0].attn)
    q, k, v = torch.randn(3, 4, 4, 17, 8)
    if long:
        linear.features.data[:] = torch.eye(8)
        q, k = torch.zeros(2, 4, 4, 17, 8)
        q[..., 0], k[..., 0], k[..., 1] = 120, -120, 120
    y = (x.double() @ w.double() for x, w in zip((q, k), linear.features, strict=True))
    phi_q, phi_k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1) for x in y)
    p = phi_q @ phi_k.mT
    p = p / p.sum(dim=-1, keepdim=True)  # a map after all: each row a distribution
    assert_close(linear.attend(vit.QK(q, k), v).double(), p @ v.double(), atol=1e-5, rtol=1e-5)
    x = torch.randn(4, 17, 32)
    q, k, v = linear.attention.project(x)
    y = linear.attend(vit.QK(q, k), v).transpose(1, 2).flatten(2)
    assert_close(linear(x)[0], linear.attention.proj(y))


def test_the_transfer_loss_is_equation_6_and_reaches_feature_maps_alone(images):
    teacher, student = make_vit(), linear_attention.linearise(make_vit())
    loss, _ = linear_attention.transfer_loss(student, images, LABELS, teacher)
    total, x = 0.0, teacher.embed(images)
    for ours, block in zip(student.blocks, teacher.blocks, strict=True):
        q, k, v = block.attn.project(block.norm1(x))
        error = vit.QK(q, k).map() @ v - ours.attn.attend(vit.QK(q, k), v)
        total += error.square().sum() / (4 * 4 * 8)  # images, heads, channels
        x, _ = block(x)
    assert_close(loss, total / 3)
    loss.backward()
    for name, p in student.named_parameters():
        assert (p.grad is not None) == name.endswith("features"), name


def test_lora_begins_as_nothing_and_is_all_that_learns(images):
    net = linear_attention.linearise(make_vit())
    before = net(images)
    linear_attention.add_lora(net, 2)
    assert_close(net(images), before)
    net(images).sum().backward()
    for name, p in net.named_parameters():
        assert (p.grad is not None) == p.requires_grad == name.endswith((".up", ".down")), name
    layer = net.blocks[1].attn.attention.qkv
    (change,), before = layer.parametrizations.weight, layer.parametrizations.weight.original
    change.up.data.normal_()
    for part in range(3):  # q, k and v each have their own
        rows, own = slice(32 * part, 32 * part + 32), 8 * change.up[part] @ change.down[part]
        assert_close(layer.weight[rows], before[rows] + own)


def test_the_loss_of_rows_is_a_divergence_of_each_head_or_of_merged_ones():
    ours, theirs = torch.randn(2, 3, 2, 10).softmax(-1)
    p, p_t = (x.clamp(1e-5, 0.996) for x in (ours, theirs))
    p, p_t = p / p.sum(-1, keepdim=True), p_t / p_t.sum(-1, keepdim=True)
    assert_close(attndistill.row_loss(ours, theirs), (p_t * (p_t / p).log()).sum() / 3)
    merged = [(x.log().sum(dim=1, keepdim=True) / 10).exp() for x in (ours, theirs[:, :1])]
    p, p_t = (x / x.sum(-1, keepdim=True) for x in merged)
    assert_close(attndistill.merge_heads(ours.log()), p)
    expected = (p_t * (p_t / p).log()).sum() / 3  # two heads and one: each as one
    assert_close(attndistill.row_loss(ours, theirs[:, :1]), expected, rtol=1e-4, atol=1e-7)


def test_a_token_is_projected_as_by_the_authors(images):
    """s -> 2 s -> s -> 2 s -> t; the teacher's token is after its own norm."""
    net, teacher = attndistill.Student(make_vit(), 32), make_vit()
    nn.init.normal_(teacher.fc_norm.weight)
    sizes = [layer.out_features for layer in net.project if isinstance(layer, nn.Linear)]
    assert sizes == [64, 32, 64, 32]
    ours = net.project(attndistill.look_last(net.vit, images)[0])
    theirs = teacher.fc_norm(teacher.forward_features(images))[:, 0]
    _, terms = attndistill.loss(net, images, LABELS, teacher, 0.0)
    assert_close(terms["token"], (ours - theirs).square().mean())
    found = checkpoints.export(teacher)  # and that norm is the file's, by whatever name
    found["model"] = {k.replace("fc_norm", "norm"): v for k, v in found["model"].items()}
    checkpoints.save(found, Path("x.pt"))
    settings = attndistill.parse(["--teacher", "x.pt"])
    loaded = attndistill.task(settings, data.load(settings)).loss.keywords["teacher"]
    assert torch.equal(loaded.fc_norm.weight, teacher.fc_norm.weight)


def test_a_row_is_that_of_the_map_and_interpolated_stays_a_distribution(images):
    net, row = make_vit(), torch.randn(2, 3, 1 + 36).softmax(-1)
    *_, (_, qk) = net.blockwise(images)
    assert_close(attndistill.look_last(net, images)[1], qk.map()[:, :, 0])
    _, terms = attndistill.loss(attndistill.Student(net, 32), images, LABELS, net, 1.0)
    assert terms["attention"].item() == pytest.approx(0, abs=1e-5)
    found = attndistill.interpolate(row, 16)
    assert_close(found.sum(dim=-1), torch.ones(2, 3))
    assert_close(found[..., 0], row[..., 0])
    found = attndistill.interpolate(torch.full((1, 1, 37), 1 / 37), 9)
    assert_close(found[..., 1:], torch.full((1, 1, 9), 4 / 37))


def test_a_reminder_is_of_the_place_that_is_meant():
    """Read back from what its words say of places and digits."""
    draw, seen = random.Random(0), set()
    steps = {"left of": -1, "right of": 1, "above": -3, "below": 3}
    for _ in range(500):
        where = dict(zip(draw.sample(range(9), 4), draw.sample(range(10), 4), strict=True))
        target = draw.choice(list(where))
        words = scenes.remind(where, target, scenes.KNOWN + scenes.NEW, draw).split()
        beside = next((b for b in steps if f" {b} the " in " ".join(["", *words])), None)
        fitting = {place for place, kind in where.items() if scenes.NAMES[kind] in words}
        if beside:
            fitting = {place + steps[beside] for place in fitting}
        else:
            rows = [i for i in range(3) if scenes.ROWS[i] in words] or range(3)
            columns = [i for i in range(3) if scenes.COLUMNS[i] in words] or range(3)
            fitting = (fitting or set(range(9))) & {3 * y + x for y in rows for x in columns}
        assert fitting == {target}, words
        seen.add(beside)
    assert seen == {None, *scenes.BESIDE}


def test_the_loss_of_a_map_is_its_divergence_from_the_right_place():
    log_p, targets, total = torch.randn(3, 6, 6).flatten(1).log_softmax(-1), (0, 4, 8), 0.0
    for p, place in zip(log_p.view(3, 6, 6), targets, strict=True):
        y, x = 2 * (place // 3), 2 * (place % 3)
        total += (math.log(0.25) - p[y : y + 2, x : x + 2].mean()) / 3
    assert_close(reminders.map_loss(log_p, torch.tensor(targets)), total)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Short runs: a CNN, a ViT, the same with linear attention, and teachers of class tokens."""
    root = tmp_path_factory.mktemp("made")
    for name, script, argv in (
        ("cnn", activations, f"{FEW} --model teacher"),
        ("softmax", finetune, f"{FEW} --data digits --teacher none"),
        ("linear", linear_attention, f"{FEW} --teacher {root}/softmax/model.pt"),
        ("labels", attndistill, "--teacher none"),
    ):
        script.main(script.parse([*SHORT, *argv.split(), "--out", str(root / name)]))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("script, argv", [
    (activations, FEW + " --kd-weight .5 --ema .9 --teacher {}/cnn/model.pt"),
    (ig, FEW + " --kd-weight .5 --at-weight 1 --bank 1 --path 3 --teacher {}/cnn/model.pt"),
    (linear_attention, FEW + " --teacher {}/softmax/model.pt"),
    (linear_attention, FEW + " --lora --teacher {}/linear/model.pt"),
    (attndistill, "--teacher none"), (attndistill, "--patch 4 --teacher {}/labels/model.pt"),
    (reminders, "--scenes 200"), (reminders, "--scenes 200 --reminder words"),
])  # fmt: skip
def test_a_run_is_resumed_to_the_same_bits(script, argv, made, interrupt):
    settings = script.parse([*SHORT, *argv.format(made).split()])
    whole = script.main(replace(settings, out="whole"))
    resumed = interrupt(script, replace(settings, out="cut"))
    assert resumed["test_top1"] == whole["test_top1"]
    nets = (checkpoints.read_file(f"{out}/last.pt")["net"] for out in ("whole", "cut"))
    assert_close(*nets, rtol=0, atol=0)
    if script is activations:  # the average brings the statistics of its norms
        state, name = checkpoints.read_file("whole/last.pt"), "norm.running_var"
        assert torch.equal(state["average"][name], state["net"][name])
    if "--lora" in argv:
        outs = (made / "softmax", made / "linear", Path("whole"))
        softmax, taught, lora = (checkpoints.read_file(out / "model.pt")["model"] for out in outs)
        for name, value in softmax.items():
            changed = name.startswith("blocks") and name.endswith(("qkv.weight", "proj.weight"))
            assert torch.equal(value, taught[name]) and torch.equal(value, lora[name]) != changed
        assert torch.equal(taught["features.0"], lora["features.0"])


@pytest.mark.slow
def test_what_cannot_teach_or_be_opened_is_refused(made, failing, photos):
    cnn, folder = made / "cnn/model.pt", ["--data", "folder", "--data-dir", photos]
    for path, more in (("missing.pt", []), (made / "softmax/model.pt", []), (cnn, folder)):
        failing(activations, ["--teacher", path, *more], path)
    other = checkpoints.read_file(made / "softmax/model.pt") | {"classes": "ab"}
    checkpoints.save(other, Path("x.pt"))
    failing(linear_attention, ["--teacher", "x.pt"])
    failing(linear_attention, ["--teacher", made / "linear/model.pt"], "--lora")
    failing(activations, ["--teacher", cnn, "--at-weight", "0"], "teaches nothing")
    failing(ensemble, [made / "linear/model.pt"], "features.0")  # not with softmax attention
    assert open_model(made / "labels/model.pt").net.config.classes == 0  # its head reads the token
