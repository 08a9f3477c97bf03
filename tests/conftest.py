import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the nets of the tests are tiny: more threads would only wait for each other

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem != "test_tutorial")  # the longest first, beside all the others


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """An image folder of three classes, each with a colour and a lot of noise: 30 images for training, 15 for validation."""
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
    return ["--data", "folder", "--data-dir", str(photos), "--image-size", "16", "--patch", "4", "--model", "micro",
            "--epochs", "2", "--labels", "24", "--warmup", "1", "--batch", "8", "--workers", "0"]  # fmt: skip


@pytest.fixture(scope="session")
def teacher(small, tmp_path_factory):
    """A teacher pre-trained (hardly) on the photos."""
    import pretrain

    out = tmp_path_factory.mktemp("teacher")
    pretrain.main(pretrain.options([*small, "--decoder-dim", "16", "--decoder-depth", "1", "--out", str(out)]))
    return str(out / "model.pt")


@pytest.fixture
def failing(capsys, monkeypatch):
    """Runs a script with arguments that must fail: the exit code, and the one line on stderr."""
    import train

    def run(script, argv):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, argv)])
        with pytest.raises(SystemExit) as stopped:
            train.run(script.main, script.options)
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return stopped.value.code, lines[0]

    return run
