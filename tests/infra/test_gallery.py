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
def test_all_pictures_are_drawn(monkeypatch):
    moments = [(epoch, torch.full((2, 3, 3), epoch / 10), 20.0 + epoch) for epoch in (0, 75)]
    monkeypatch.setattr(pointer, "learn", lambda *_: iter(moments))
    names = [name for name in draw.PICTURES if not name.endswith(".html")]
    draw.main(draw.parse([*names, "--out", "."]))
    for name in names:
        Image.open(name).verify()
