"""Scenes: their labels against the pixels, and what the teacher learns against a loop."""

from dataclasses import replace

import pytest
import torch
from einops import rearrange
from torch.testing import assert_close

import attention_copy
import data
import finetune
import pretrain
from datasets import digits
from teachers import find

SPLIT = digits.read_parts("cpu")


def load(*argv, script=finetune):
    return data.load(script.parse(["--data", "scenes", *argv]))


def cut(images, grid=3):
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", h=grid, w=grid)


def draw(part="train", *argv):
    """Clean scenes, in cells; their classes, and the cells asked for."""
    views = [load(*argv, "--label", label) for label in ("class", "cell")]
    sources = [getattr(view, part).source for view in views]
    assert torch.equal(sources[0].images, sources[1].images)
    grid = views[0].image_size // 8
    return cut(sources[0].images, grid), *(source.labels for source in sources)


def find_digits(cells, part):
    """For each cell the number of the digit in it, and its class."""
    images, labels = SPLIT[part]
    nearest = torch.cdist(cells, images.flatten(1)).argmin(dim=-1)
    return nearest, labels[nearest]


@pytest.mark.parametrize("classes, grid", [("5:", 3), (":5", 3), ("0,7", 5)])
def test_the_square_points_to_the_class(classes, grid):
    size = ["--image-size", str(8 * grid), "--num-labels", "0", "--classes", classes]
    cells, labels, asked = (x[:300] for x in draw("train", *size))
    names, centre = load(*size).classes, grid**2 // 2
    square = rearrange(cells[:, centre], "b (p q) -> b p q", p=8) == 1
    place = torch.stack([x.nonzero().float().mean(0) for x in square])  # of its middle, 0.5 to 6.5
    towards = (place - 0.5) / 6 * (grid - 1)
    assert (towards - torch.stack([asked // grid, asked % grid], 1)).abs().max() < 0.5
    assert (asked != centre).all() and len(asked.unique()) == grid**2 - 1
    _, kinds = find_digits(cells, "train")
    assert [names[i] for i in labels] == [str(int(k)) for k in kinds[torch.arange(300), asked]]
    others = kinds[:, torch.arange(grid**2) != centre]
    assert {str(int(k)) for k in others.unique()} == set(names)


def test_twins_are_one_image_and_other_pairs_only_of_one_class():
    cells, labels, asked = (x[:200] for x in draw("train", "--scene", "twins", "--num-labels", "0"))
    numbers, kinds = (x.tolist() for x in find_digits(cells, "train"))
    lying = [i for i in range(9) if i != 4]
    assert cells[:, 4].max(dim=1).values.eq(0).all()
    for image, (of_cells, of_kinds) in enumerate(zip(numbers, kinds, strict=True)):
        pairs = {k: [of_cells[i] for i in lying if of_kinds[i] == k] for k in {*of_kinds}}
        pairs = {k: pair for k, pair in pairs.items() if pair}
        equal = [k for k, pair in pairs.items() if len(set(pair)) == 1]
        assert sorted(map(len, pairs.values())) == [2] * 4
        assert equal == [of_kinds[asked[image]]] == [5 + int(labels[image])]


def test_the_dial_turns_content_into_position():
    for dial in ("0", "0.5", "1"):
        share = (draw("val", "--dial", dial)[2] == 0).float().mean().item()
        assert share == pytest.approx(float(dial) + (1 - float(dial)) / 8, abs=0.04)


def test_no_digit_of_a_part_is_in_another_and_scenes_are_the_same_every_time():
    pictures = [{x.numpy().tobytes() for x in SPLIT[p][0]} for p in ("train", "val", "test")]
    assert not pictures[0] & pictures[2] and not pictures[1] & pictures[2]
    once, again = (load().test.source for _ in range(2))
    assert torch.equal(once.images, again.images) and torch.equal(once.labels, again.labels)


def test_training_and_evaluation_have_the_same_noise():
    view = load("--num-labels", "0")
    batches = [next(iter(view.train.epoch(epoch)))[0] for epoch in range(20)]
    images, seen = torch.cat(batches), next(view.test.in_order(1280))[0]
    for measure in (torch.mean, torch.std):
        assert measure(images).item() == pytest.approx(measure(seen).item(), abs=0.03)
    assert not torch.equal(batches[0], batches[1])


def test_the_teacher_says_the_pixels_of_the_cell_asked_for():
    settings = pretrain.parse(["--data", "scenes", "--model", "nano"])
    dataset = data.load(replace(settings, label="cell"))
    net = pretrain.task(settings, dataset).net
    images, asked = dataset.train.first(5)
    pixels = cut(net.normalise(images))[torch.arange(5), asked]
    expected = (net(images) - pixels).square().mean()
    assert_close(pretrain.loss_cell(net, images, asked)[0], expected)


def test_a_teacher_made_for_scenes_sees_other_digits_than_its_student(monkeypatch):
    made, argv = [], "--data scenes --scene twins --dial 0.5 --flip 0 --teacher pretrain".split()
    monkeypatch.setattr(pretrain, "main", made.append)
    monkeypatch.setattr(find, "world", lambda: 3)  # processes, which share each batch
    find.make_teacher(pretrain, attention_copy.parse(argv), load("--scene", "twins"))
    (own,) = made
    assert (own.scene, own.classes, own.dial, own.target) == ("twins", ":5", 0.0, "cell")
    assert own.flip == 0 and own.batch % 3 == 0
