import os
import sys
from dataclasses import replace

# The nets of the tests are tiny: more threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain
import train
from common import launch

torch.set_num_threads(1)

LONGEST = "test_gpu test_runs test_related test_reproduce test_tutorial test_teachers".split()


def pytest_collection_modifyitems(items):
    """The longest first, as each file goes to one process; a hidden GPU cannot be seen again."""
    items.sort(key=lambda item: [item.path.stem != name for name in LONGEST])


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu(request):
    """All but test_gpu: there runs are the same to the bit."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem != "test_gpu":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # in processes that are started
            patch.setattr(torch.accelerator, "is_available", lambda: False)  # in this one
        yield


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Each test in a folder of its own: what a reader has trained in runs/ must not matter."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """An image folder of three coloured, noisy classes: 30 images to train, 15 to validate."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 5)):
        for channel, name in enumerate(("blue", "green", "red")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (24, 20, 3))
                pixels[:, :, 2 - channel] += 90
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def small(photos):
    """Arguments that make any script finish at once on those photos."""
    images = f"--data folder --data-dir {photos} --image-size 16 --num-labels 24 --workers 0"
    return f"{images} --patch 4 --model micro --epochs 2 --warmup 0.5 --batch 8".split()


@pytest.fixture(scope="session")
def teacher(small, tmp_path_factory):
    """A teacher pre-trained (hardly) on the photos."""
    out = tmp_path_factory.mktemp("teacher")
    more = f"--decoder-dim 16 --decoder-depth 1 --out {out}".split()
    pretrain.main(pretrain.parse([*small, *more]))
    return str(out / "model.pt")


@pytest.fixture
def failing(capsys, monkeypatch):
    """Runs a script that must fail: with this exit code, and one line on stderr with all words."""

    def run(script, argv, *words, code=2):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, argv)])
        with pytest.raises(SystemExit) as stopped:
            launch.run(script.main, script.parse)
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert stopped.value.code == code and all(str(word) in lines[0] for word in words), lines

    return run


@pytest.fixture
def interrupt(monkeypatch):
    """Runs a script, stopped after its first epoch and resumed."""

    def run(script, settings) -> dict:
        save = train.Learner.save

        def stop(*state):
            save(*state)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train.Learner, "save", stop)
            script.main(settings)
        return script.main(replace(settings, resume=True))

    return run
