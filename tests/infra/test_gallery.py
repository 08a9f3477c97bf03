"""The gallery shows what is really trained, and can be drawn."""

import pytest
import torch
from PIL import Image

import attention_distill
from gallery import draw, pointer
from teachers.load import open_model


@pytest.mark.slow
def test_the_animation_shows_what_a_run_learns(monkeypatch):
    """Its maps and accuracy after the last epoch are those of the run's model.pt."""
    monkeypatch.setattr(pointer, "FRAMES", {0, 2})
    argv = "--epochs", "2", "--warmup", "0.5", "--out", "run"
    images = pointer.load_images("scenes", 2)
    (start, before, _), (end, looks, top1) = pointer.learn(attention_distill, images, *argv)
    trained = attention_distill.main(attention_distill.parse(argv))
    assert (start, end) == (0, 2) and top1 == trained["test_top1"]
    expected = 10 * next(open_model("run/model.pt").blockwise(images))[1].map()[:, :, 5, 1:]
    torch.testing.assert_close(looks, expected.mean(dim=1).view(2, 3, 3))
    assert not torch.allclose(looks, before)


@pytest.mark.slow
def test_the_animation_has_a_frame_for_each_moment(monkeypatch, tmp_path):
    moments = [(epoch, torch.full((2, 3, 3), epoch / 10), 20.0 + epoch) for epoch in (0, 5, 75)]
    monkeypatch.setattr(pointer, "learn", lambda *_: iter(moments))
    pointer.draw_pointer(tmp_path / "pointer.gif")
    with Image.open(tmp_path / "pointer.gif") as animation:
        assert animation.n_frames == 3 and animation.size == (720, 700)


@pytest.mark.slow
def test_all_other_pictures_are_drawn(tmp_path):
    names = [name for name in draw.PICTURES if name.endswith(".png")]
    draw.main(draw.parse([*names, "--out", str(tmp_path)]))
    assert all((tmp_path / name).stat().st_size > 300 for name in names)


def test_a_picture_that_is_unknown_is_refused(failing):
    failing(draw, ["teacher.png"], "pointer.gif")
