"""Pictures of where a ViT looks."""

import shutil
from pathlib import Path

import pytest
import torch

import data
import finetune
import look
from common import pictures
from datasets import folders
from teachers.load import open_model


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("trained"))
    finetune.main(finetune.parse([*small, "--teacher", "none", "--out", out]))
    return f"{out}/model.pt"


@pytest.fixture
def figures(monkeypatch):  # that are saved
    found, save = [], pictures.save
    monkeypatch.setattr(pictures, "save", lambda fig, path: (found.append(fig), save(fig, path)))
    return found


def run(*argv):
    return look.main(look.parse(list(map(str, argv))))


def get_weights(fig) -> list[torch.Tensor]:  # what is drawn over the photograph
    return [torch.tensor(ax.images[0].get_array().data) for ax in fig.axes if len(ax.images) == 2]


def test_the_likeliest_classes_are_those_of_the_model(trained, small, photos, capsys):
    photo = photos / "val" / "red" / "1.jpg"
    seen, out = run(photo, trained), capsys.readouterr().out
    dataset = data.load(finetune.parse(small))
    paths = folders.list_images(photos / "val").paths
    images, _ = next(dataset.test.in_order(15))
    p = open_model(trained)(images)[paths.index(str(photo))].softmax(-1)
    expected = dict(zip(dataset.classes, (100 * p).tolist(), strict=True))
    assert seen == pytest.approx(expected, abs=1e-3)
    assert list(seen.values()) == sorted(seen.values(), reverse=True)
    (picture,) = Path("runs").iterdir()
    assert picture.stat().st_size > 5000 and str(picture) in out


def test_what_is_drawn_is_the_mean_of_the_maps(trained, photos, figures):
    """Over queries that are patches; of all heads, then of each; as multiples of uniform."""
    photo = str(photos / "val" / "red" / "1.jpg")
    run(photo, trained, "--layers", "-3:", "--heads", "0,2", "--out", "a.png")
    maps = look.look(photo, open_model(trained))[1]
    expected = []
    for heads in (slice(None), slice(0, 1), slice(2, 3)):
        expected += [17 * p[0, heads, 1:, 1:].mean(dim=(0, 1)).view(4, 4) for p in maps[-3:]]
    for ours, theirs in zip(get_weights(figures[0]), expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs)
    assert [axis.get_title() for axis in figures[0].axes[1:3]] == ["layer 1", "layer 2"]


@pytest.mark.parametrize(("query", "token"), [("2,3", 1 + 2 * 4 + 3), ("class", 0)])
def test_a_query_shows_where_one_token_looks(query, token, trained, photos, figures):
    """And its patch is framed."""
    photo = str(photos / "val" / "red" / "1.jpg")
    run(photo, trained, "--layers", "1", "--heads", "3", "--query", query, "--out", "a.png")
    p = look.look(photo, open_model(trained))[1][1][0]
    for ours, of_heads in zip(get_weights(figures[0]), (p, p[3:4]), strict=True):
        expected = 17 * of_heads[:, token, 1:].mean(dim=0).view(4, 4)
        torch.testing.assert_close(ours.float(), expected)
    frames = [box for axis in figures[0].axes[:4] for box in axis.patches]
    assert [x.get_bbox().bounds for x in frames] == [(12.0, 8.0, 4.0, 4.0)] * 4 * bool(token)


def test_a_query_that_is_no_patch_is_refused(trained):
    for query in ("4,0", "-1,0", "1", "1,2,3", "centre"):
        with pytest.raises(ValueError, match="0,0 to 3,3, or class"):
            look.find_query(query, open_model(trained).net)


def test_a_teacher_without_a_head_still_shows_where_it_looks(teacher, photos, figures, capsys):
    """Its name is no mathematics."""
    photo = shutil.copy(photos / "val" / "red" / "1.jpg", r"$\frac{$.jpg")
    assert run(photo, teacher, "--image-size", "32", "--heads", "all") == {}
    assert "%" not in capsys.readouterr().out
    drawn = get_weights(figures[0])
    assert len(drawn) == 5 * 4 and drawn[0].shape == (8, 8)
