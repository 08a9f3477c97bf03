"""The related systems: each loss against its formula, and against what it must be."""

import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import data
import ensemble
import finetune
import related.integrated_gradients as ig
import vit
from common import augment, checkpoints, launch
from related import activations, attndistill, dino, linear_attention, reminders, scenes
from related.wide_resnet import WideResNet
from teachers.load import open_model

SHORT = ["--epochs", "2", "--warmup", "0"]
LABELS = torch.tensor([1, 2, 3, 4])
DIGITS = data.Data([*"0123456789"], 12, (0.25,), (0.35,))


@pytest.fixture(autouse=True)
def images():
    torch.manual_seed(0)
    return torch.randn(4, 1, 12, 12)


def make_vit():
    torch.manual_seed(1)
    return vit.ViT(vit.Config(12, 3, 1, 10, 32, 3, 4)).eval()


def assert_nothing_to_learn(loss, net):
    grads = torch.autograd.grad(loss, net.parameters(), allow_unused=True)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert all(g is None or g.abs().max() < 1e-6 for g in grads)


def test_at_is_as_in_loops():
    maps, both = [], (torch.randn(3, 5, 4, 4), torch.randn(3, 7, 4, 4))  # of other widths
    for x in both:
        for image in x:
            active = [sum(c[i, j] ** 2 for c in image) for i in range(4) for j in range(4)]
            maps.append([a / math.sqrt(sum(b**2 for b in active)) for a in active])
    ours, theirs = torch.tensor(maps).split(3)
    assert_close(activations.at(both[0]), ours)
    assert_close(activations.at_loss(*both), ((ours - theirs) ** 2).sum() / (3 * 16))


def test_softened_classes_are_compared_by_their_divergence():
    logits, theirs = torch.randn(2, 3, 10)
    q, p = (logits / 4).softmax(-1), (theirs / 4).softmax(-1)
    found = activations.kd_loss(logits, theirs, activations.parse([]))
    assert_close(found, (p * (p / q).log()).sum() * 16 / 3)


@pytest.mark.parametrize("name", ["at", "kd"])
def test_a_teacher_as_its_own_student_has_nothing_to_learn_from_it(name, images):
    net = WideResNet("teacher", DIGITS).eval()
    settings = activations.parse(["--at-weight", "0", "--kd-weight", "0", f"--{name}-weight", "1"])
    total, terms = activations.loss(net, images, LABELS, net, settings)
    assert_nothing_to_learn(terms[name], net)
    assert torch.equal(total, sum(terms.values()))


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


def test_maps_are_laid_over_in_pixels():
    pixels, maps = torch.rand(2, 6, 1, 4, 4)
    both = torch.cat([pixels, maps], dim=1)
    for overlay, seen in ((1.0, 0.5 * pixels + 0.5 * maps), (0.0, pixels)):
        draws = augment.BatchRandom(augment.seeded(0), 6, slice(0, 6), torch.device("cpu"))
        found = ig.lay_over(both, draws, overlay, nn.Identity())
        assert_close(found[:, :1], seen)
        assert torch.equal(found[:, 1:], both[:, :1])  # what the teacher sees


@pytest.mark.parametrize("flags", [[], ["--shuffle"], ["--raw"]])
def test_each_image_has_its_own_map_or_that_of_another(flags, tmp_path):
    settings = ig.parse(["--num-labels", "50", "--bank", "1", "--overlay", "1", *flags])
    net, dataset = WideResNet("teacher", DIGITS).eval(), data.load(settings)
    kept = checkpoints.Checkpoint(str(tmp_path / "model.pt"), net.state_dict(), {})
    view = ig.add_maps(dataset, net, kept, settings).train
    bank, labels = dataset.train.first(50)
    black = torch.zeros(1, 1, 1, 1)
    maps = ig.make_hint(ig.integrate_gradients(net, bank, labels, black, settings.path))
    whose = torch.arange(50) - (1 if "--shuffle" in flags else 0)
    laid = 0.35 * maps[whose] + 0.25 if "--raw" in flags else maps[whose]
    for image in next(view.epoch(0))[0]:
        which = (bank - image[1:]).abs().sum(dim=(1, 2, 3)).argmin()
        assert_close(image[:1], 0.5 * bank[which] + 0.5 * laid[which])


@pytest.fixture(scope="module")
def short(photos, tmp_path_factory):
    """Arguments of a run on a few photos, with a teacher that was made in two epochs."""
    argv = f"--data folder --data-dir {photos} --image-size 16 --workers 0 --batch 8".split()
    argv += [*SHORT, "--num-labels", "0", "--device", "cpu"]
    out = str(tmp_path_factory.mktemp("teacher"))
    activations.main(activations.parse([*argv, "--model", "teacher", "--out", out]))
    return [*argv, "--teacher", out + "/model.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("script, argv", [
    (activations, "--kd-weight .5 --ema .9"),
    (ig, "--kd-weight .5 --at-weight 1 --bank 1 --path 3"),
])  # fmt: skip
def test_a_cnn_is_resumed_to_the_same_bits(script, argv, short, stopped):
    result = stopped(script, script.parse([*short, *argv.split()]))
    assert result["kd"] > 0 and result["at"] > 0
    state, name = checkpoints.read_file("whole/last.pt"), "norm.running_var"
    if "average" in state:  # it brings the statistics of its norms
        assert torch.equal(state["average"][name], state["net"][name])


@pytest.mark.slow
def test_maps_are_made_once_for_the_same_images_and_points(short):
    argv = [*short, "--bank", "2", "--at-weight", "1", "--kd-weight", "0.5", "--path"]
    times, rows = [], []
    for out, points in (("one", "3"), ("two", "3"), ("three", "4")):
        rows.append(ig.main(ig.parse([*argv, points, "--out", out])))
        times.append(Path(short[-1]).with_name("maps.pt").stat().st_mtime_ns)
    assert times[0] == times[1] != times[2]
    assert all(rows[0][k] == rows[1][k] for k in ("class", "kd", "at", "test_top1"))


def test_what_is_no_teacher_of_these_images_is_refused(short, failing, tmp_path):
    torch.save({"model": {}, "settings": None}, tmp_path / "x.pt")
    for path in ("missing.pt", tmp_path / "x.pt", short[-1]):
        failing(activations, ["--teacher", path, "--out", tmp_path / "run"], path)


def test_linear_attention_is_that_of_its_maps():
    attention = make_vit().blocks[0].attn
    linear, x = linear_attention.LinearAttention(attention), torch.randn(4, 17, 32)
    (q, k, v), found = attention.project(x), torch.empty(4, 4, 17, 8)
    for head in range(4):
        y = q[:, head] @ linear.features[0, head], k[:, head] @ linear.features[1, head]
        phi_q, phi_k = (torch.cat([z.softmax(-1), (-z).softmax(-1)], dim=-1) for z in y)
        p = phi_q @ phi_k.mT
        p = p / p.sum(dim=-1, keepdim=True)  # a map after all: each row a distribution
        found[:, head] = p @ v[:, head]
    assert_close(linear.attend(vit.QK(q, k), v), found)
    assert_close(linear(x)[0], attention.proj(found.transpose(1, 2).flatten(2)))


def test_a_long_query_that_is_like_no_key_finds_the_mean_of_values():
    """As by the definition in higher precision. Without the clamp both sums would be 0."""
    linear = linear_attention.LinearAttention(make_vit().blocks[0].attn).double()
    linear.features.data = torch.eye(8).repeat(2, 4, 1, 1).double()
    q, k = torch.zeros(2, 1, 4, 5, 8).double()
    q[..., 0], k[..., 0], k[..., 1] = 120, -120, 120
    v = torch.randn(1, 4, 5, 8).double()
    phi_q, phi_k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1) for x in (q, k))
    p = phi_q @ phi_k.mT
    found = linear.float().attend(vit.QK(q.float(), k.float()), v.float())
    assert_close(found.double(), p / p.sum(-1, keepdim=True) @ v, atol=1e-5, rtol=1e-5)


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
    F.cross_entropy(net(images), LABELS).backward()
    learned = {name for name, p in net.named_parameters() if p.grad is not None}
    assert learned == {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in learned} == {"up", "down"}
    layer = net.blocks[1].attn.attention.qkv
    (change,), before = layer.parametrizations.weight, layer.parametrizations.weight.original
    change.up.data.normal_()
    for part in range(3):  # q, k and v each have their own
        rows, own = slice(32 * part, 32 * part + 32), 8 * change.up[part] @ change.down[part]
        assert_close(layer.weight[rows], before[rows] + own)
        assert torch.linalg.matrix_rank(own) == 2


@pytest.mark.slow
def test_both_steps_of_linear_attention_are_resumed_to_the_same_bits(stopped, failing):
    argv, parse = [*SHORT, "--data", "digits", "--num-labels", "50"], linear_attention.parse
    finetune.main(finetune.parse([*argv, "--teacher", "none", "--out", "softmax"]))
    stopped(linear_attention, parse([*argv, "--teacher", "softmax/model.pt"]))
    Path("whole").rename("taught")
    shutil.rmtree("cut")
    stopped(linear_attention, parse([*argv, "--lora", "--teacher", "taught/model.pt"]))
    outs = ("softmax", "taught", "whole")
    softmax, taught, lora = (checkpoints.read_file(f"{out}/model.pt") for out in outs)
    for name, value in softmax["model"].items():
        changed = name.startswith("blocks") and name.endswith(("qkv.weight", "proj.weight"))
        assert torch.equal(value, taught["model"][name]), name
        assert torch.equal(value, lora["model"][name]) != changed, name
    assert torch.equal(taught["model"]["features.0"], lora["model"]["features.0"])
    checkpoints.save(softmax | {"classes": list("abcdefghij")}, Path("other.pt"))
    failing(linear_attention, ["--teacher", "other.pt"])
    failing(ensemble, ["taught/model.pt"], "features.0")  # it would give it softmax attention


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
    """s -> 2 s -> s -> 2 s -> t, between two norms; the teacher's token is after its own norm."""
    net, teacher = attndistill.Student(make_vit(), 48), make_vit()
    nn.init.normal_(teacher.fc_norm.weight)
    (*_, (token, _)), own = net.vit.blockwise(images), list(net.project.parameters())
    token, sizes = token[:, 0] * 1e-3, []  # small, so that eps counts
    x = F.layer_norm(token, (32,), *own[:2], eps=1e-6)
    for weight, bias in zip(own[2:8:2], own[3:9:2], strict=True):
        x = F.gelu(x @ weight.T + bias)
        sizes.append(len(bias))
    x = F.layer_norm(x @ own[8].T + own[9], (48,), *own[10:], eps=1e-6)
    assert sizes == [64, 32, 64]
    assert_close(net.project(token), x)
    net = attndistill.Student(net.vit, 32)
    _, terms = attndistill.loss(net, images, LABELS, teacher, 0.0)
    *_, (token, _) = net.vit.blockwise(images)
    theirs = teacher.fc_norm(teacher.forward_features(images))[:, 0]
    assert_close(terms["token"], (net.project(token[:, 0]) - theirs).square().mean())


def test_an_interpolated_row_stays_a_distribution():
    row = torch.randn(2, 3, 1 + 36).softmax(-1)
    found = attndistill.interpolate(row, 16)
    assert_close(found.sum(dim=-1), torch.ones(2, 3))
    assert_close(found[..., 0], row[..., 0])
    found = attndistill.interpolate(torch.full((1, 1, 37), 1 / 37), 9)
    assert_close(found[..., 1:], torch.full((1, 1, 9), 4 / 37))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_of_where_to_look(images):
    net = make_vit()
    _, terms = attndistill.loss(attndistill.Student(net, 32), images, LABELS, net, 1.0)
    assert_nothing_to_learn(terms["attention"], net)
    *_, (_, qk) = net.blockwise(images)
    assert_close(attndistill.look_last(net, images)[1], qk.map()[:, :, 0])


def test_each_view_is_pulled_to_what_the_teacher_makes_of_the_other():
    settings = dino.parse(["--prototypes", "6"])
    net, views = dino.Dino(make_vit(), settings), torch.randn(4, 2, 12, 12)
    center = net.center.normal_().clone()
    both = torch.cat([views[:, :1], views[:, 1:]])
    with torch.no_grad():  # in training, norms are over the batch
        theirs, ours = net.teacher(both), net.student(both)
    p = ((theirs - center) / settings.teacher_temperature).softmax(dim=-1)
    log_p = (ours / settings.student_temperature).log_softmax(dim=-1)
    loss, _ = dino.loss(net, views, None, 4)
    assert_close(loss, -sum(p[(i + 4) % 8] @ log_p[i] for i in range(8)) / 8)
    assert_close(net.center, 0.9 * center + 0.1 * theirs.mean(dim=0))
    loss.backward()
    assert all(p.grad is None for p in net.teacher.parameters())
    with pytest.raises(launch.Failed):
        dino.loss(net, views[:2], None, 4)


@pytest.mark.slow
def test_attndistill_is_resumed_to_the_same_bits_as_are_its_teachers(stopped):
    dino.main(dino.parse([*SHORT, "--model", "nano", "--out", "dino"]))
    stopped(attndistill, attndistill.parse([*SHORT, "--teacher", "none"]))
    Path("whole").rename("labels")
    assert open_model("labels/model.pt").net.config.classes == 0  # its head reads another token
    for teacher in ("dino", "labels"):
        shutil.rmtree("cut", ignore_errors=True)
        shutil.rmtree("whole", ignore_errors=True)
        argv = [*SHORT, "--teacher", f"{teacher}/model.pt", "--num-heads", "2", "--patch", "4"]
        found = stopped(attndistill, attndistill.parse(argv))
        assert found["attention"] > 0 and found["token"] > 0


def test_a_reminder_is_of_the_place_that_is_meant():
    """Read back from what its words say of places and digits."""
    draw, seen = random.Random(0), set()
    steps = {"left of": -1, "right of": 1, "above": -3, "below": 3}
    for _ in range(500):
        where = dict(zip(draw.sample(range(9), 4), draw.sample(range(10), 4), strict=True))
        target = draw.choice(list(where))
        said = scenes.remind(where, target, scenes.KNOWN + scenes.NEW, draw)
        words, beside = said.split(), next((b for b in steps if f" {b} the " in f" {said} "), None)
        fitting = {place for place, kind in where.items() if scenes.NAMES[kind] in words}
        if beside:
            fitting = {place + steps[beside] for place in fitting}
        else:
            rows = [i for i in range(3) if scenes.ROWS[i] in words] or range(3)
            columns = [i for i in range(3) if scenes.COLUMNS[i] in words] or range(3)
            fitting = (fitting or set(range(9))) & {3 * y + x for y in rows for x in columns}
        assert fitting == {target}, said
        seen.add(beside)
    assert seen == {None, *scenes.BESIDE}


def test_the_loss_of_a_map_is_its_divergence_from_the_right_place():
    log_p, targets, total = torch.randn(3, 6, 6).flatten(1).log_softmax(-1), (0, 4, 8), 0.0
    for p, place in zip(log_p.view(3, 6, 6), targets, strict=True):
        y, x = 2 * (place // 3), 2 * (place % 3)
        total += (math.log(0.25) - p[y : y + 2, x : x + 2].mean()) / 3
    assert_close(reminders.map_loss(log_p, torch.tensor(targets)), total)


@pytest.mark.slow
@pytest.mark.parametrize("reminder", ["words", "attention"])
def test_a_robot_is_resumed_to_the_same_bits(reminder, stopped):
    stopped(reminders, reminders.parse([*SHORT, "--scenes", "200", "--reminder", reminder]))
    tested = checkpoints.read_file("whole/test.pt")
    assert ("looked" in tested) == (reminder == "attention") == Path("whole/reminders.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script, argv", [
    (attndistill, "--teacher vit/model.pt --num-heads 2"),
    (linear_attention, "--teacher vit/model.pt --lora"),
    (reminders, "--scenes 200"), (reminders, "--scenes 100 --reminder words"),
])  # fmt: skip
def test_two_ranks_train_to_the_weights_of_one(script, argv):
    """All but dino and the CNNs, whose norms are over the batch of each process."""
    short = [*SHORT, "--amp", "off", "--device", "cpu"]
    finetune.main(finetune.parse([*short, "--data", "digits", "--teacher", "none", "--out", "vit"]))
    argv = [*short, *argv.split(), "--out"]
    script.main(script.parse([*argv, "one"]))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    run = [sys.executable, "-m", *torchrun, script.__name__, *argv, "two"]
    env = os.environ | {"PYTHONPATH": str(Path(vit.__file__).parent)}
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    one, two = (checkpoints.read_file(f"{out}/last.pt")["net"] for out in ("one", "two"))
    for name, value in one.items():
        if not name.endswith("qkv.bias"):  # that of keys has no gradient but rounding's
            assert_close(two[name], value, rtol=1e-3, atol=1e-4)
