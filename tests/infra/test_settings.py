"""Settings: recipes, bounds, layers as Python slices, and that each setting is read somewhere."""

import contextlib
import itertools
import sys
from dataclasses import fields

import pytest

import attention_copy
import attention_distill
import finetune
import pretrain
from common.settings import get_values, list_flags, parse_layers
from related import activations, attndistill, reminders
from study.jobs import to_argv
from train import get_learning_rate

METHODS = (finetune, attention_copy, attention_distill, pretrain)


@pytest.mark.parametrize("script, extra, unread", [
    (finetune, "--teacher none", set()), (finetune, "--teacher TEACHER", {"positions"}),
    (attention_copy, "--teacher TEACHER", set()),
    (attention_distill, "--teacher TEACHER --layers :2", set()),
    (pretrain, "--decoder-dim 16", {"smoothing", "eval_every"}),  # they are for classes only
    (activations, "--model teacher", {"at_weight", "kd_weight", "temperature"}),
    (attndistill, "--teacher none", {"attention_weight", "eval_every"}),
    (reminders, "--scenes 200", {"eval_every"}),
])  # fmt: skip
def test_every_setting_is_read(script, extra, unread, small, teacher):
    """A flag that nobody reads is the published code's worst bug: its --end_layer has no effect."""
    read = set()

    class Watched(script.Settings):
        def __getattribute__(self, name):
            where = sys._getframe(1).f_code.co_filename
            if not where.endswith(("common/settings.py", "dataclasses.py")):  # they copy it whole
                read.add(name)
            return super().__getattribute__(name)

    images = small if script in METHODS else ["--epochs", "2", "--warmup", "0"]
    settings = script.parse([*images, *extra.replace("TEACHER", teacher).split()])
    script.main(Watched(**{f.name: getattr(settings, f.name) for f in fields(settings)}))
    photos, digits = "distractors classes", "crop_area flip randaugment random_erase workers"
    others = f"scene dial label recipe overwrite {photos if script in METHODS else digits}"
    flags = list_flags(script.Settings).keys()
    assert flags - read == unread | flags & {*others.split()}


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100", "imagenet", "folder"])
def test_a_recipe_changes_defaults_and_the_command_line_beats_both(script, name, monkeypatch):
    monkeypatch.setitem(script.RECIPES, "cifar100", script.RECIPES["cifar"] | {"epochs": 7})
    recipe = script.RECIPES["cifar" if name == "cifar10" else name]
    found = script.parse(["--data", name, "--blr", "9"])
    for key, field in list_flags(script.Settings).items():
        expected = {"data": name, "blr": 9.0}.get(key, recipe.get(key, field.default))
        assert getattr(found, key) == expected
    assert script.Settings().blr > 0  # of a data set without a recipe
    assert found.given == {"data", "blr"} and script.parse(to_argv(get_values(found))) == found


@pytest.mark.parametrize("extra, batch, peak", [
    ("", 8, 0.125), ("--batch 4", 4, 0.0625), ("--lr 0.3", 8, 0.3), ("--lr 0.3 --batch 4", 4, 0.3),
    ("--batch 0", 3, 3 / 64),  # an eighth of the images
])  # fmt: skip
def test_the_rate_is_for_256_images_unless_it_is_set_outright(extra, batch, peak, small):
    argv = [*small, "--teacher", "none", "--blr", "4", "--final-lr", "0.5", *extra.split()]
    steps = 2 * 24 // batch
    last = get_learning_rate(steps - 1, steps, steps // 2, peak, 0.5)
    assert finetune.main(finetune.parse(argv))["lr"] == pytest.approx(last)


def check_layers(text, depth, expected):
    refused = pytest.raises(ValueError, match=r"^--layers")
    with contextlib.nullcontext() if expected else refused:
        assert parse_layers(text, depth) == list(expected)


@pytest.mark.parametrize("depth", [1, 4, 12])
def test_layers_are_pythons_slices(depth):
    bounds, layers = ["", *range(-depth, depth + 1)], range(depth)
    for first, last, step in itertools.product(bounds, bounds, ("", ":1", f":{depth}")):
        text = f"{first}:{last}{step}"
        check_layers(text, depth, eval(f"layers[{text}]"))
    for i in range(-depth, depth):
        check_layers(str(i), depth, [layers[i]])


@pytest.mark.parametrize("text, depth, expected", [
    ("0,2,4:7", 12, [0, 2, 4, 5, 6]), ("0,-2:", 12, [0, 10, 11]), ("all", 3, [0, 1, 2]),
    ("100%", 3, [0, 1, 2]), ("75%", 24, range(18)), ("75%", 2, [0]), ("75%", 1, [0]),
    *((text, 4, None) for text in ["", "two", "1.5", "4", "-5", "0:5", ":1000000000", "2,1", "0,0",
    "0:2,1", "::-1", "::0", "1:2:3:4", "0-2", "1,", "150%", "-10%x", "%", "nan%"]),
])  # fmt: skip
def test_layers_in_lists_and_per_cent(text, depth, expected):
    check_layers(attention_copy.parse(["--layers", text]).layers, depth, expected)
