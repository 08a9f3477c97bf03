"""The related systems: each loss against its formula in loops, and against what it must be."""

from launch import Failed

import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import augment
import checkpoints
import ensemble
import finetune
import learner
import lending
import storage
import vit
from attention import attention_map
from experiments import related_tables
from experiments.rows import Runs
from related import (
    activations,
    attndistill,
    dino,
    integrated_gradients,
    linear_attention,
    reminders,
    scenes,
)
from related.wide_resnet import MODELS, WideResNet


def images_of(seed=0):
    torch.manual_seed(seed)
    return torch.randn(4, 1, 12, 12), torch.tensor([1, 2, 3, 4])


def test_where_a_layer_is_active_is_as_in_loops():
    torch.manual_seed(0)
    ours, theirs = torch.randn(3, 5, 4, 4), torch.randn(3, 7, 4, 4)  # of other widths
    total, maps = 0.0, []
    for x in (ours, theirs):
        maps.append([])
        for image in x:
            active = [[sum(c[i, j] ** 2 for c in image) for j in range(4)] for i in range(4)]
            flat = torch.tensor([v for row in active for v in row])
            maps[-1].append(flat / flat.norm())
    for a, b in zip(*maps, strict=True):
        total += sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
    assert activations.at_loss(ours, theirs).item() == pytest.approx(float(total) / (3 * 16))
    torch.testing.assert_close(activations.at(ours), torch.stack(maps[0]))


def test_classes_are_compared_as_each_papers_code_does_it():
    torch.manual_seed(0)
    logits, theirs, t = torch.randn(3, 10), torch.randn(3, 10), 4.0
    total = 0.0
    for a, b in zip(logits, theirs, strict=True):
        q, p = torch.softmax(a / t, 0), torch.softmax(b / t, 0)
        total += sum(p[i] * (p[i].log() - q[i].log()) for i in range(10))
    for kd, factor in (("kl", 16 / 3), ("moonshine", 2 * 16 / 30)):
        settings = activations.parse(["--kd", kd])
        found = activations.kd_loss(logits, theirs, settings)
        assert found.item() == pytest.approx(float(total) * factor, rel=1e-5)


@pytest.mark.parametrize("weight", ["--at-weight", "--kd-weight"])
def test_a_teacher_as_its_own_student_has_nothing_to_learn_from_it(weight):
    torch.manual_seed(0)
    net, (images, labels) = WideResNet("teacher", 1, 10).eval(), images_of()
    settings = activations.parse(["--at-weight", "0", "--kd-weight", "0", weight, "1"])
    terms, _ = activations.loss(net, images, labels, net, settings)
    name = weight[2:4]
    grads = torch.autograd.grad(terms[name], net.parameters(), allow_unused=True)
    assert terms[name].item() == pytest.approx(0, abs=1e-6)
    assert all(g is None or g.abs().max() < 1e-6 for g in grads)


@pytest.mark.parametrize("model", MODELS)
def test_students_have_the_shape_of_the_teachers_maps(model):
    images, _ = images_of()
    shapes = [x.shape[2:] for x in WideResNet(model, 1, 10).run(images)]
    assert shapes == [(12, 12), (6, 6), (3, 3)]
    if model in ("grouped", "bottleneck"):  # as wide as the teacher, and cheaper
        ours, theirs = (list(WideResNet(m, 1, 10).run(images)) for m in (model, "teacher"))
        assert [x.shape for x in ours] == [x.shape for x in theirs]
        counts = [
            sum(p.numel() for p in WideResNet(m, 1, 10).parameters()) for m in (model, "teacher")
        ]
        assert counts[0] < counts[1] / 2


def test_the_average_of_weights_brings_the_statistics_of_its_norms():
    net, average = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    net(torch.randn(50, 3) * 3 + 1)
    learner.update_average(average, net, 0.9, 5)
    assert torch.equal(average[1].running_var, net[1].running_var)
    assert average[1].num_batches_tracked == 1


@pytest.fixture(scope="module")
def short(photos, tmp_path_factory):
    """Arguments of a run on a few photos, with a teacher that was made in two epochs."""
    argv = ["--data", "folder", "--data-dir", str(photos), "--image-size", "16", "--workers", "0"]
    argv += ["--epochs", "2", "--warmup", "0", "--batch", "8", "--num-labels", "0"]
    out = tmp_path_factory.mktemp("teacher")
    activations.main(activations.parse([*argv, "--model", "teacher", "--out", str(out)]))
    return [*argv, "--teacher", str(out / "model.pt")]


@pytest.mark.parametrize("script, argv", [
    (activations, ["--kd-weight", "0.5", "--ema", "0.9"]),
    (integrated_gradients, ["--kd-weight", ".5", "--at-weight", "1", "--bank", "1", "--path", "3"]),
])  # fmt: skip
def test_a_cnn_is_resumed_to_the_same_bits(script, argv, short, stopped):
    result = stopped(script, script.parse([*short, *argv, "--device", "cpu"]))
    assert result["kd"] > 0 and result["at"] > 0


def test_what_is_no_teacher_is_refused(failing, tmp_path):
    for path, words in (
        ("missing.pt", "no teacher at"),
        ("x.pt", "not what --model teacher leaves"),
        ("y.pt", "holds the weights of another net"),
    ):
        torch.save({"model": {}, "settings": None}, tmp_path / "x.pt")
        about = {"method": "activations", "settings": {"model": "teacher"}, "model": {}}
        digits = {"classes": list("0123456789"), "normalization": ([0.0], [1.0])}
        torch.save(about | digits, tmp_path / "y.pt")
        code, line = failing(activations, ["--teacher", tmp_path / path, "--out", tmp_path / "run"])
        assert code == 2 and words in line


# Linear attention ---------------------------------------------------------------------------------


def small_vit(seed=0):
    torch.manual_seed(seed)
    return vit.ViT(vit.Config(12, 3, 1, 10, 32, 3, 4)).eval()


def test_linear_attention_is_that_of_its_maps_in_loops():
    net = small_vit()
    linear = linear_attention.LinearAttention(net.blocks[0].attn, 8)
    images, _ = images_of()
    (_, used), *_ = net.run(images)
    found = linear.see(used)
    for image, head in ((0, 0), (3, 2)):
        q, k = [], []
        for phi, x, w in zip((q, k), (used.q, used.k), linear.features, strict=True):
            for token in x[image, head]:
                y = token @ w[head]
                phi.append(torch.cat([y.softmax(0), (-y).softmax(0)]))
        p = torch.stack(q) @ torch.stack(k).T
        p = p / p.sum(dim=1, keepdim=True)  # a map after all: each row a distribution
        torch.testing.assert_close(found[image, head], p @ used.v[image, head])


def test_the_transfer_loss_is_equation_6_and_reaches_feature_maps_alone():
    teacher, student = small_vit(), linear_attention.linearised(small_vit())
    images, labels = images_of()
    terms, _ = linear_attention.transfer_loss(student, images, labels, teacher)
    total = 0.0
    for block, (_, used) in zip(student.blocks, teacher.run(images), strict=True):
        y, y_hat = attention_map(used) @ used.v, block.attn.see(used)
        of_layer = 0.0
        for image in range(4):
            for head in range(4):
                of_layer += ((y - y_hat)[image, head] ** 2).sum() / 8
        total += of_layer / (4 * 4)
    assert terms["transfer"].item() == pytest.approx(total.item() / 3, rel=1e-5)
    terms["transfer"].backward()
    for name, p in student.named_parameters():
        assert (p.grad is not None) == name.endswith("features"), name


def test_a_low_rank_change_begins_as_nothing_and_is_all_that_learns():
    net, (images, labels) = linear_attention.linearised(small_vit()), images_of()
    before = net(images)
    linear_attention.low_rank(net, 2)
    torch.testing.assert_close(net(images), before)
    nn.functional.cross_entropy(net(images), labels).backward()
    learned = {n for n, p in net.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 1)[1] for n in learned} == {"up", "down"}
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    layer = net.blocks[1].attn.attention.qkv
    change = layer.parametrizations.weight[0]
    change.up.data.normal_()
    before = layer.parametrizations.weight.original
    for part in range(3):  # q, k and v each have their own
        rows = slice(32 * part, 32 * (part + 1))
        own = 8 * change.up[part] @ change.down[part]
        torch.testing.assert_close(layer.weight[rows], before[rows] + own)
        assert torch.linalg.matrix_rank(own) == 2


# Integrated gradients -----------------------------------------------------------------------------


def test_what_pixels_contributed_adds_up_to_the_difference_of_outputs():
    """Completeness (Sundararajan et al. 2017, section 3); of a linear net it is x times weight."""
    torch.manual_seed(0)
    net = WideResNet("small", 1, 10).eval().requires_grad_(False)
    (images, labels), black = images_of(), torch.full((1, 1, 1, 1), -0.7)
    found = integrated_gradients.integrated_gradients(net, images, labels, black, 400)
    whole = net(images).gather(1, labels[:, None]) - net(black.expand_as(images)).gather(
        1, labels[:, None]
    )
    torch.testing.assert_close(found.sum(dim=(1, 2, 3)), whole[:, 0], atol=2e-3, rtol=2e-2)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(144, 10))
    found = integrated_gradients.integrated_gradients(linear, images, labels, black, 3)
    weight = linear[1].weight[labels].view(4, 1, 12, 12)
    torch.testing.assert_close(found, (images - black) * weight)


def test_maps_are_laid_over_in_pixels():
    torch.manual_seed(0)
    normalise = augment.Normalise(([0.25], [0.35]), "cpu")
    pixels, maps = torch.rand(6, 1, 4, 4), torch.rand(6, 1, 4, 4)
    both = torch.cat([normalise(pixels), maps], dim=1)
    draws = augment.Draws(augment.seeded(0), 6, slice(0, 6), torch.device("cpu"))
    found = integrated_gradients.lay_over(both, draws, 1.0, normalise)
    torch.testing.assert_close(found[:, :1], normalise(0.5 * pixels + 0.5 * maps))
    assert torch.equal(found[:, 1:], both[:, :1])  # what the teacher sees
    draws = augment.Draws(augment.seeded(0), 6, slice(0, 6), torch.device("cpu"))
    found = integrated_gradients.lay_over(both, draws, 0.0, normalise)
    assert torch.equal(found, both[:, :1].expand(-1, 2, -1, -1))


def test_maps_are_made_once_and_known_by_what_they_are_of(short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [*short, "--bank", "2", "--path", "3", "--at-weight", "1", "--kd-weight", "0.5"]
    script = integrated_gradients
    first = script.main(script.parse([*argv, "--out", "one"]))
    kept = Path(short[-1]).with_name("integrated-gradients.pt")
    before = kept.stat().st_mtime_ns
    second = script.main(script.parse([*argv, "--out", "two"]))
    assert kept.stat().st_mtime_ns == before
    assert all(first[k] == second[k] for k in ("class", "kd", "at", "test_top1"))
    script.main(script.parse([*argv, "--path", "4", "--out", "three"]))
    assert kept.stat().st_mtime_ns != before


# AttnDistill and DINO -----------------------------------------------------------------------------


def rows_of(*shape, seed=0):
    torch.manual_seed(seed)
    return torch.randn(*shape).softmax(dim=-1)


def test_the_loss_of_rows_is_as_in_loops():
    ours, theirs = rows_of(3, 2, 10), rows_of(3, 2, 10, seed=1)
    total = 0.0
    for b in range(3):
        for h in range(2):
            p, p_t = (x[b, h].clamp(1e-5, 0.996) for x in (ours, theirs))
            p, p_t = p / p.sum(), p_t / p_t.sum()
            total += sum(t * (t.log() - s.log()) for s, t in zip(p, p_t, strict=True)) / 3
    assert attndistill.row_loss(ours, theirs).item() == pytest.approx(float(total), rel=1e-5)


def test_heads_are_taken_together_as_in_loops():
    row, found = rows_of(2, 3, 5), []
    for image in row:
        scores = [sum(image[h, i].log() for h in range(3)) / 10 for i in range(5)]
        found.append(torch.tensor(scores).softmax(dim=0))
    torch.testing.assert_close(lending.aggregated(row.log())[:, 0], torch.stack(found))
    unlike = attndistill.row_loss(row[:, :2], row)  # two heads and three: each as one
    p, p_t = lending.aggregated(row[:, :2].log()), lending.aggregated(row.log())
    assert unlike.item() == pytest.approx(
        nn.functional.kl_div(p.log(), p_t, reduction="sum").item() / 2, rel=1e-4
    )


def test_a_row_of_other_patches_stays_a_distribution():
    row = rows_of(2, 3, 1 + 36)
    found = attndistill.interpolated(row, 16)
    assert found.shape == (2, 3, 17)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 3))
    torch.testing.assert_close(found[..., 0], row[..., 0])
    even = torch.full((1, 1, 37), 1 / 37)
    torch.testing.assert_close(
        attndistill.interpolated(even, 9)[..., 1:], torch.full((1, 1, 9), 4 / 37)
    )


def test_a_student_that_is_its_teacher_has_nothing_to_learn_of_where_to_look():
    net, (images, labels) = small_vit(), images_of()
    student = attndistill.Student(net, 32)
    terms, _ = attndistill.loss(student, images, labels, net, 1.0)
    grads = torch.autograd.grad(terms["attention"], net.parameters(), allow_unused=True)
    assert terms["attention"].item() == pytest.approx(0, abs=1e-6)
    assert all(g is None or g.abs().max() < 1e-6 for g in grads)


def test_each_view_is_pulled_to_what_the_teacher_makes_of_the_other():
    settings = dino.parse(["--prototypes", "6"])
    net = dino.Dino(small_vit(), settings)
    views = torch.randn(4, 2, 12, 12)
    center = net.center.normal_().clone()
    one, two = views[:, :1], views[:, 1:]
    both = torch.cat([one, two])
    with torch.no_grad():  # in training, norms are over the batch
        theirs, ours = net.teacher(both), net.student(both)
    total = 0.0
    for i in range(8):
        p = ((theirs[(i + 4) % 8] - center) / settings.teacher_temperature).softmax(dim=0)
        total -= (p * (ours[i] / settings.student_temperature).log_softmax(dim=0)).sum() / 8
    terms, _ = dino.loss(net, views, None, 4)
    assert terms["views"].item() == pytest.approx(total.item(), rel=1e-5)
    torch.testing.assert_close(net.center, 0.9 * center + 0.1 * theirs.mean(dim=0))
    terms["views"].backward()
    assert all(p.grad is None for p in net.teacher.parameters())
    with pytest.raises(Failed, match="must fit in memory at once"):
        dino.loss(net, views[:2], None, 4)


# Reminders ----------------------------------------------------------------------------------------


def test_a_reminder_is_of_the_place_that_is_meant():
    """Read back by what its words say of places and digits."""
    draw, seen = random.Random(0), set()
    for _ in range(500):
        where = dict(zip(draw.sample(range(9), 4), draw.sample(range(10), 4), strict=True))
        target = draw.choice(list(where))
        said = scenes.remind(where, target, scenes.KNOWN + scenes.NEW, draw)
        fitting, words = set(range(9)), said.split()
        named = [place for place, kind in where.items() if scenes.NAMES[kind] in words]
        beside = next((b for b in scenes.BESIDE if f" {b} the " in f" {said} "), None)
        if beside:
            step = {"left of": -1, "right of": 1, "above": -3, "below": 3}[beside]
            fitting = {named[0] + step}
        for i, (row, column) in enumerate(zip(scenes.ROWS, scenes.COLUMNS, strict=True)):
            if row in words:
                fitting &= {p for p in range(9) if p // 3 == i}
            if column in words and not beside:
                fitting &= {p for p in range(9) if p % 3 == i}
        if named and not beside:
            fitting &= set(named)
        assert fitting == {target}, said
        seen.add(beside)
    assert seen == {None, *scenes.BESIDE}
    assert all(word in scenes.VOCABULARY for word in " ".join(scenes.NAMES).split())
    unheard = {w for said in scenes.NEW for w in said.split() if "{" not in w}
    assert unheard - scenes.VOCABULARY.keys()


def test_the_loss_of_a_map_is_its_divergence_from_the_right_place():
    log_p, targets = torch.randn(3, 36).log_softmax(dim=-1), torch.tensor([0, 4, 8])
    total = 0.0
    for p, target in zip(log_p, targets, strict=True):
        row, column = divmod(int(target), 3)
        right = [6 * y + x for y in (2 * row, 2 * row + 1) for x in (2 * column, 2 * column + 1)]
        total += sum(0.25 * (math.log(0.25) - p[i]) for i in right) / 3
    assert reminders.map_loss(log_p, targets).item() == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize("reminder", ["words", "attention"])
def test_a_robot_is_resumed_to_the_same_bits(reminder, stopped):
    argv = ["--scenes", "200", "--epochs", "2", "--warmup", "0", "--reminder", reminder]
    stopped(reminders, reminders.parse(argv))
    tested = storage.read(Path("whole/test.pt"))
    assert ("looked" in tested) == (reminder == "attention") == Path("whole/reminders.png").exists()


def test_linear_attention_is_taught_then_mended_and_resumed_to_the_same_bits(stopped, failing):
    argv = ["--epochs", "2", "--warmup", "0", "--num-labels", "50"]
    finetune.main(finetune.parse([*argv, "--teacher", "none", "--out", "softmax"]))
    parse = linear_attention.parse
    stopped(linear_attention, parse([*argv, "--teacher", "softmax/model.pt"]))
    Path("whole").rename("taught")
    shutil.rmtree("cut")
    stopped(linear_attention, parse([*argv, "--lora", "--teacher", "taught/model.pt"]))
    softmax, taught, mended = (
        checkpoints.read(f"{out}/model.pt").weights for out in ("softmax", "taught", "whole")
    )
    for name, value in softmax.items():
        changed = any(part in name for part in ("qkv.weight", "proj.weight")) and "blocks" in name
        assert torch.equal(value, taught[name]) and torch.equal(value, mended[name]) != changed, (
            name
        )
    assert torch.equal(taught["features.0"], mended["features.0"])
    state = storage.read(Path("softmax/model.pt"))
    storage.save(state | {"classes": list("abcdefghij")}, Path("other.pt"))
    code, line = failing(linear_attention, ["--teacher", "other.pt"])
    assert code == 2 and "its head is not of the 10 classes of --data digits" in line
    code, line = failing(ensemble, ["taught/model.pt"])  # which would give it softmax attention
    assert code == 2 and "features.0 is not ours" in line


def test_attndistill_is_resumed_to_the_same_bits_and_dino_is_its_teacher(stopped, capsys):
    argv = ["--epochs", "2", "--warmup", "0"]
    dino.main(dino.parse([*argv, "--model", "nano", "--out", "teacher"]))
    argv += ["--teacher", "teacher/model.pt", "--num-heads", "2"]
    found = stopped(attndistill, attndistill.parse(argv))
    assert found["attention"] > 0 and found["token"] > 0


@pytest.mark.parametrize("reminder", ["attention", "words", "none"])
def test_every_parameter_of_a_robot_learns(reminder):
    """Or DDP would wait for its gradient."""
    task = reminders.task(reminders.parse(["--scenes", "100", "--reminder", reminder]))
    images, which = next(task.data.train.epoch(0))
    terms, _ = task.loss(task.net, images, which)
    sum(terms.values()).backward()
    assert not [name for name, p in task.net.named_parameters() if p.grad is None]


TOGETHER = """
import sys
sys.path.insert(0, {root!r})
import launch
from related import attndistill, linear_attention, reminders
argv = {argv!r}
def main(out):
    for script in (attndistill, linear_attention, reminders):
        name = script.__name__.split(".")[1]
        script.main(script.parse([*argv[name], "--out", out + "/" + name]))
launch.run(main, lambda argv: argv[0])
"""


def test_two_ranks_train_to_the_weights_of_one(tmp_path):
    """All but dino and the CNNs, whose norms are over the batch of each process."""
    short = ["--epochs", "2", "--warmup", "0", "--amp", "off"]
    finetune.main(finetune.parse([*short, "--teacher", "none", "--out", str(tmp_path / "vit")]))
    taught = [*short, "--teacher", str(tmp_path / "vit" / "model.pt")]
    argv = {
        "attndistill": [*taught, "--num-heads", "2"],
        "linear_attention": [*taught, "--lora"],
        "reminders": [*short, "--scenes", "200"],
    }
    driver = tmp_path / "driver.py"
    driver.write_text(
        TOGETHER.format(root=str(Path(related_tables.__file__).parent.parent), argv=argv)
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launcher in {"one": [], "two": torchrun}.items():
        run = [sys.executable, *launcher, str(driver), str(tmp_path / name)]
        done = subprocess.run(run, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    for name in argv:
        nets = [torch.load(tmp_path / ranks / name / "last.pt")["net"] for ranks in ("one", "two")]
        for key, value in nets[0].items():
            if not key.endswith("qkv.bias"):  # that of keys has no gradient but rounding's
                torch.testing.assert_close(nets[1][key], value, rtol=1e-3, atol=1e-4)


# The rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", related_tables.TABLES)
def test_each_row_is_a_run_of_its_own_that_can_be_asked_for(name, tmp_path):
    table, runs, folders = related_tables.TABLES[name], Runs(related_tables.STUDY, tmp_path), set()
    ((_, point),) = table.points.items()
    for row in table.rows:
        needed = runs.jobs(row, 3, point, {})
        for job in needed.values():
            assert set(job.after) <= needed.keys() and job.settings().seed in (3, 1003)
        folders.add(list(needed.values())[-1].out)
    assert len(folders) == len(table.rows)
    assert set((table.against or {}).values()) <= {*table.rows}
