"""Settings: recipes, bounds, layers as Python slices, and that each setting is read somewhere."""

import itertools
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import attention_copy
import attention_distill
import ensemble
import finetune
import look
import pretrain
from common.settings import flags_of, parse_layers, to_argv, values_of
from train import get_learning_rate

ROOT = Path(__file__).parent.parent
METHODS = (finetune, attention_copy, attention_distill, pretrain)
ALL = (*METHODS, ensemble, look)


def argv_of(script, *argv):
    """With the positional words that some scripts need."""
    return ["A", *argv] if script in (ensemble, look) else list(argv)


def flag(name):
    return "--" + name.replace("_", "-")


@pytest.mark.parametrize("script, extra", [
    (finetune, []), (finetune, ["--teacher", "none"]), (attention_copy, []),
    (attention_distill, ["--layers", ":2"]), (pretrain, ["--decoder-dim", "16"]),
])  # fmt: skip
def test_every_setting_is_read(script, extra, small, teacher, tmp_path):
    """A flag that nobody reads is the published code's worst bug: its --end_layer has no effect."""
    read = set()

    class Watched(script.Settings):
        def __getattribute__(self, name):
            where = sys._getframe(1).f_code.co_filename
            if not where.endswith(("common/settings.py", "dataclasses.py")):  # they copy it whole
                read.add(name)
            return super().__getattribute__(name)

    if script is not pretrain and extra[:1] != ["--teacher"]:
        extra = [*extra, "--teacher", teacher]
    settings = script.parse([*small, "--out", str(tmp_path / "run"), *extra])
    watched = Watched(**{f.name: getattr(settings, f.name) for f in fields(settings)})
    script.main(watched)
    assert flags_of(script.Settings).keys() <= read | {"distractors"}  # which only digits have


@pytest.mark.parametrize("script", ALL)
def test_every_bound_and_choice_is_checked(script):
    for name, field in flags_of(script.Settings).items():
        kind, about, wrong = type(field.default), field.metadata, []
        if about["choices"]:
            wrong = ["nonsense"]
        elif kind in (int, float):
            wrong = ["nonsense", "nan", str(kind(about["low"] - 1))]
            wrong += [str(kind(about["high"] + 1))] if about["high"] < float("inf") else []
        for value in wrong:
            with pytest.raises(ValueError, match=f"{flag(name)}.*(must be|invalid)"):
                script.parse(argv_of(script, f"{flag(name)}={value}"))


@pytest.mark.parametrize("script", ALL)
def test_help_fits_a_terminal_and_shows_the_defaults_of_digits(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        script.parse(["--help"])
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert left.value.code == 0 and max(map(len, lines)) <= 80
    assert lines[0].startswith("usage: ") and lines[1] == ""  # one line, not a wall of flags
    usual = script.parse(argv_of(script))
    shown = 0
    for name, field in flags_of(script.Settings).items():
        found = re.search(rf"^  {flag(name)} [^[]*\[([^]]*)\]", text, re.MULTILINE)
        assert (f"  {flag(name)} " in text) == bool(field.metadata["help"])
        shown += bool(field.metadata["help"])
        if field.metadata["help"] and getattr(usual, name) not in ("", False, -1):
            assert found[1] == str(getattr(usual, name))
    assert shown <= 34 or script is pretrain


@pytest.mark.slow
def test_help_needs_no_pictures_and_no_public_models():
    code = "import sys, attention_distill, common.launch; sys.argv[1:] = ['--help']\n"
    code += "try: common.launch.run(attention_distill.main, attention_distill.parse)\n"
    code += "finally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--attention-weight" in done.stdout
    unneeded = {"matplotlib", "timm", "teachers.zoo", "teachers.convert", "common.pictures"}
    assert "train" in done.stderr.split() and not unneeded & set(done.stderr.split())


def test_positional_words_may_stand_anywhere():
    assert ensemble.parse(["a.pt", "--batch", "7", "b.pt"]).checkpoints == ["a.pt", "b.pt"]


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100", "imagenet", "folder"])
def test_a_recipe_changes_defaults_and_the_command_line_beats_both(script, name):
    found = script.parse(["--data", name, "--blr", "9"])
    recipe = script.RECIPES[name.rstrip("01")]
    for key, field in flags_of(script.Settings).items():
        expected = {"data": name, "blr": 9.0}.get(key, recipe.get(key, field.default))
        assert getattr(found, key) == expected
    assert recipe.keys() <= flags_of(script.Settings).keys()
    assert found.given == {"data", "blr"}
    assert script.parse(to_argv(values_of(found))) == found


def test_from_scratch_has_a_recipe_of_its_own():
    scratch, tuned = finetune.parse(["--teacher=none"]), finetune.parse([])
    assert scratch.weight_decay != tuned.weight_decay and scratch.layer_decay == 1
    assert (scratch.method, tuned.method) == ("scratch", "finetune")
    assert finetune.parse(["--teacher", "none", "--weight-decay", "0.2"]).weight_decay == 0.2


@pytest.mark.parametrize("argv, peak", [
    ([], 0.002), (["--batch", "25"], 0.001), (["--batch", "100"], 0.004), (["--lr", "0.3"], 0.3),
    (["--lr", "0.3", "--batch", "25"], 0.3), (["--blr", "0.256"], 0.05),
])  # fmt: skip
def test_the_rate_is_for_256_images_unless_it_is_set_outright(argv, peak, tmp_path):
    argv = ["--teacher", "none", "--epochs", "2", "--warmup", "0.5", "--final-lr", "0.5", *argv]
    settings = finetune.parse([*argv, "--out", str(tmp_path), "--model", "nano"])
    steps = 2 * (100 // settings.batch)
    last = get_learning_rate(steps - 1, steps, steps // 2, peak, 0.5)
    assert finetune.main(settings)["lr"] == pytest.approx(last)


def test_a_small_folder_is_cut_into_small_batches(photos, tmp_path, capsys):
    argv = f"--data folder --data-dir {photos} --image-size 32 --epochs 1 --warmup 0 --model nano"
    settings = finetune.parse([*argv.split(), "--teacher", "none", "--out", str(tmp_path)])
    row = finetune.main(settings)
    said = " ".join(capsys.readouterr().out.split())
    assert "10 batches of 3" in said  # 30 images: an eighth of them
    peak = settings.blr * 3 / 256
    assert row["lr"] == pytest.approx(get_learning_rate(9, 10, 0, peak, settings.final_lr))


def test_settings_do_not_change():
    with pytest.raises(AttributeError, match="cannot assign"):
        finetune.parse([]).lr = 1


# Layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 4, 12])
def test_layers_are_pythons_slices(depth):
    bounds = [None, *range(-depth, depth + 1)]
    for first, last, step in itertools.product(bounds, bounds, (None, 1, 2)):
        if step and step > depth:
            continue
        words = ["" if x is None else str(x) for x in (first, last)] + [str(step)] * bool(step)
        expected = list(range(depth))[first:last:step]
        if expected:
            assert parse_layers(":".join(words), depth) == expected
        else:
            with pytest.raises(ValueError, match=r"--layers .*choose some of 0 to"):
                parse_layers(":".join(words), depth)
    for i in range(-depth, depth):
        assert parse_layers(str(i), depth) == [range(depth)[i]]


def test_layers_in_lists_and_per_cent():
    assert parse_layers("0,2,4:7", 12) == [0, 2, 4, 5, 6]
    assert parse_layers("0,-2:", 12) == [0, 10, 11]
    assert parse_layers("all", 5) == parse_layers("100%", 5) == list(range(5))
    for depth, count in ((24, 18), (12, 9), (4, 3), (2, 1), (1, 1)):
        assert parse_layers("75%", depth) == list(range(count))
    for argv in (["--layers", "-2:"], ["--layers=-2:"]):
        assert parse_layers(attention_copy.parse(argv).layers, 4) == [2, 3]


@pytest.mark.parametrize("text", [
    "", "two", "1.5", "4", "-5", "0:5", "99", ":1000000000", "3:1", "2,1", "0,0", "0:2,1", "::-1",
    "::0", "1:2:3:4", "0-2", "1,", "110%", "-10%x", "%", "all,3", "nan%",
])  # fmt: skip
def test_other_layers_are_refused_and_the_flag_is_named(text):
    with pytest.raises(ValueError, match="^--teacher-layers"):
        parse_layers(text, 4, "teacher_layers")
