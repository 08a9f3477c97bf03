"""Settings: defaults of a data set, bounds, and that each is read somewhere."""

import re
from typing import ClassVar

import pytest

import attention_copy
import attention_distill
import data
import ensemble
import finetune
import pretrain
import settings
from experiments import analysis, reproduce
from learner import learning_rate
from settings import Settings
from speed import benchmark, loader, loss_forms

METHODS = (finetune, attention_copy, attention_distill, pretrain)
ALL = (*METHODS, ensemble, analysis, reproduce, benchmark, loader, loss_forms)


def argv_of(script, *argv):
    """With the positional words that some scripts need."""
    return ["A", *argv] if script in (ensemble, analysis) else list(argv)


class Watched(Settings):
    read: ClassVar[set] = set()

    def __getattribute__(self, name):
        Watched.read.add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    "script, extra",
    [
        (finetune, []),
        (finetune, ["--teacher", "none"]),
        (attention_copy, []),
        (attention_distill, ["--layers", "2"]),
        (pretrain, ["--decoder-dim", "16"]),
    ],
)
def test_every_setting_is_read(script, extra, small, teacher, tmp_path):
    """A flag that nobody reads is the published code's worst bug: its --end_layer has no effect."""
    if script is not pretrain and extra[:1] != ["--teacher"]:
        extra = [*extra, "--teacher", teacher]
    asked = Watched(**vars(script.parse([*small, "--out", str(tmp_path / "run"), *extra])))
    Watched.read.clear()
    script.main(asked)
    elsewhere = {  # read only where there is something to do; tested there
        "resume", "overwrite", "skip_unreadable", "scraps", "teacher_heads",
    }  # fmt: skip
    assert script.SETTINGS.keys() <= Watched.read | elsewhere


@pytest.mark.parametrize("script", ALL)
def test_every_bound_and_choice_is_checked(script):
    for name, row in script.SETTINGS.items():
        flag, kind = "--" + name.replace("_", "-"), type(row.of(0))
        wrong = ["nonsense"] if row.choices else []
        if kind in (int, float):
            wrong += [str(kind(row.low - 1))]
            wrong += [str(kind(row.high + 1))] if row.high < float("inf") else []
            wrong += ["nan", "inf"] if kind is float else []
        for value in wrong:
            with pytest.raises(ValueError, match=f"{flag} .*(must be|choose one of)"):
                script.parse(argv_of(script, f"{flag}={value}"))


@pytest.mark.parametrize("script", ALL)
def test_help_fits_a_terminal_and_shows_every_setting(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        script.parse(["--help"])
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert left.value.code == 0 and max(map(len, lines)) <= 80
    assert lines[0].startswith("usage: ") and lines[1] == ""  # one line, not a wall of flags
    for name in script.SETTINGS:
        assert "--" + name.replace("_", "-") in text
    if script in METHODS:
        assert "[Defaults] are those of digits" in text and "--help --data" in text


@pytest.mark.parametrize("script", METHODS)
def test_help_shows_the_defaults_of_the_data_set_that_is_named(script, capsys):
    for name, kind in data.KINDS.items():
        with pytest.raises(SystemExit):
            script.parse(["--data", name, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        asked, recipe = script.parse(["--data", name]), settings.RECIPES[kind.recipe]
        assert f"[Defaults] are those of {recipe}" in text
        for key in ("lr", "epochs", "patch", "model"):
            (shown,) = re.search(rf"--{key} X [^\[]*\[(.*?)\]", text).groups()
            assert shown == str(getattr(asked, key))


def test_help_offers_nothing_that_is_refused(capsys):
    for script, offered in (
        (finetune, "none"),
        (attention_copy, "random"),
        (attention_distill, "random"),
    ):
        with pytest.raises(SystemExit):
            script.parse(["--help"])
        text = capsys.readouterr().out.partition("--teacher X")[2].partition("--teacher-heads")[0]
        assert offered in text and ({"none", "random"} - {offered}).pop() not in text


def test_positional_words_may_stand_anywhere():
    assert ensemble.parse(["a.pt", "--batch", "7", "b.pt"]).checkpoints == ["a.pt", "b.pt"]


def test_defaults_are_those_of_the_data_set():
    for name, recipe in (("digits", 0), ("cifar100", 1), ("imagenet", 2), ("folder", 3)):
        found = attention_distill.parse(["--data", name, "--attention-weight", "9"])
        for key, row in attention_distill.SETTINGS.items():
            expected = {"data": name, "attention_weight": 9.0}.get(key, row.of(recipe))
            assert getattr(found, key) == expected


def test_a_variant_has_defaults_of_its_own():
    scratch, tuned = finetune.parse(["--teacher=none"]), finetune.parse([])
    for found, table in ((scratch, finetune.SCRATCH), (tuned, finetune.SETTINGS)):
        assert found.weight_decay == table["weight_decay"].of(0)
        assert found.layer_decay == table["layer_decay"].of(0)
    assert scratch.weight_decay != tuned.weight_decay
    assert finetune.parse(["--teacher", "none", "--weight-decay", "0.2"]).weight_decay == 0.2


def test_warm_up_follows_the_number_of_epochs_unless_given():
    usual = finetune.parse([])
    half = finetune.parse(["--epochs", str(usual.epochs // 2)])
    assert half.warmup == usual.warmup / 2 > 0
    assert finetune.parse(["--epochs=90", "--warmup=7"]).warmup == 7


def test_a_folder_has_a_recipe_of_its_own():
    for script in METHODS:
        digits, cifar, folder = (
            script.parse(["--data", d]) for d in ("digits", "cifar10", "folder")
        )
        assert (folder.model, folder.batch, folder.lr_batch) == ("mini", 0, 64)
        assert folder.weight_decay == cifar.weight_decay  # CIFAR's where there is no other
        assert digits.batch == digits.lr_batch and cifar.batch == cifar.lr_batch


@pytest.mark.parametrize("argv, factor", [
    ([], 1), (["--batch", "25"], 0.5), (["--batch", "100"], 2),
    (["--batch", "25", "--lr", "0.004"], 1), (["--batch", "25", "--lr-batch", "100"], 0.25),
])  # fmt: skip
def test_the_rate_follows_the_batch_unless_it_is_given(argv, factor, tmp_path, capsys):
    """The recipe's is for its batch (50): scaled linearly, from its peak to its end."""
    argv = ["--teacher", "none", "--epochs", "2", "--warmup", "1", "--min-lr", "0.001", *argv]
    row = finetune.main(finetune.parse([*argv, "--out", str(tmp_path)]))
    asked, said = finetune.parse(argv), capsys.readouterr().out
    batches = 100 // asked.batch
    steps = 2 * batches, batches
    last = learning_rate(steps[0] - 1, *steps, factor * asked.lr, factor * asked.min_lr)
    assert row["lr"] == pytest.approx(last)
    assert ("at batch" in said) == (factor != 1)
    if factor != 1:
        assert f"({asked.lr:g} at batch {asked.lr_batch})" in " ".join(said.split())


def test_a_small_folder_is_cut_into_small_batches_and_it_is_said(photos, tmp_path, capsys):
    argv = ["--data", "folder", "--data-dir", str(photos), "--image-size", "32"]
    argv += ["--epochs", "1", "--warmup", "0", "--model", "micro", "--out", str(tmp_path)]
    row = finetune.main(finetune.parse([*argv, "--teacher", "none"]))
    said = " ".join(capsys.readouterr().out.split())  # 30 images: batches of 3
    assert "10 batches of 3 (1/8 of the images, at most 64)" in said and "at batch 64)" in said
    assert row["lr"] < finetune.parse(argv).lr * 3 / 64


def test_settings_do_not_change():
    usual = finetune.parse([])
    with pytest.raises(AttributeError, match="frozen"):
        usual.lr = 1
    other = usual.but(lr=1.0, new=2)
    assert (other.lr, other.new, other.epochs) == (1.0, 2, usual.epochs) and usual.lr != 1


def test_what_may_change_at_a_resumption_is_marked_in_its_row():
    assert {
        "data_dir", "workers", "out", "resume", "overwrite", "save_every", "device", "micro_batch",
        "compile", "memory", "teacher",
    } == settings.FREE  # fmt: skip
