"""The notebook: executed afresh from top to bottom, its checks passed, stored whole."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NUMBER = r"-?\d+\.\d+(?:e[-+]\d+)?"
ROWS = ("from scratch", "attention copy", "attention distillation", "fine-tuning")


def printed(notebook) -> str:
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert not [out.evalue for out in outputs if out.output_type == "error"]
    return "".join(out.text for out in outputs if out.get("name") == "stdout")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """What the cells print when the notebook is run, on shorter runs, in a fresh copy."""
    here = tmp_path_factory.mktemp("course")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, here)
    for folder in ("common", "datasets", "teachers", "experiments", "results", "weights"):
        shutil.copytree(ROOT / folder, here / folder)
    digits = here / "datasets/digits.py"
    digits.write_text(digits.read_text().replace("PLACES = 4", "PLACES = 1"))
    notebook = nbformat.read(ROOT / "tutorial.ipynb", as_version=4)
    for old, new in (('"--epochs", "200"', '"--epochs", "20"'), ("range(60 if", "range(2 if")):
        cell = next(cell for cell in notebook.cells if old in cell.source)
        cell.source = cell.source.replace(old, new)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(here)}}).execute()
    return printed(notebook)


def row(text: str, name: str, after: str) -> list[float]:
    """The figures of the first line that begins with `name` behind the last line with `after`."""
    found = [line for line in text[text.rindex(after) :].splitlines() if line.startswith(name)]
    return [float(x) for x in re.findall(NUMBER, found[0])]


@pytest.mark.slow
def test_an_untrained_map_is_nearly_uniform_and_lending_is_copying(text):
    entropy, most = row(text, "entropy", "of layer 0")
    assert 0.95 * most < entropy <= most
    assert float(re.search(rf"largest difference ({NUMBER})", text)[1]) < 1e-5
    assert row(text, "rotated", "largest difference")[1] < 1e-5


@pytest.mark.slow
def test_the_loss_and_its_gradient_are_as_derived(text):
    loss, floor, divergence = row(text, "loss", "rotated")
    assert 0 < divergence < floor < loss == pytest.approx(floor + divergence, abs=2e-4)
    relative = [float(x) for x in re.findall(rf"largest relative difference ({NUMBER})", text)]
    assert len(relative) == 2 and max(relative) < 1e-10


@pytest.mark.slow
def test_a_copys_maps_are_the_teachers(text):
    maps, features = "divergence from the teacher's maps", "CKA with the teacher's features"
    lent, own = (row(text, name, maps)[::2] for name in ("attention copy", "from scratch"))
    assert max(lent) < 5e-4 < min(own)
    for name in ROWS:
        assert all(0 <= x < 0.6932 for x in row(text, name, maps))
        assert all(-0.2 <= x <= 1.0001 for x in row(text, name, features))


@pytest.mark.slow
def test_a_gain_is_relative_to_fine_tunings(text):
    line = rf"^{{}} +test top-1 +({NUMBER}) % +(-?\d+)%"
    found = {name: re.search(line.format(name), text, re.M).groups() for name in ROWS}
    scratch, tuned = (float(found[name][0]) for name in (ROWS[0], ROWS[-1]))
    for top1, percent in found.values():
        gain = float(percent) / 100 * (tuned - scratch)
        assert float(top1) - scratch == pytest.approx(gain, abs=0.3)


def test_the_stored_notebook_is_whole_and_small():
    notebook = nbformat.read(ROOT / "tutorial.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # in order
    assert not re.search("Warning|/tmp|/home|/root|/work", printed(notebook))
    outputs = [out for cell in cells for out in cell.outputs]
    assert not [out.text for out in outputs if out.get("name") == "stderr"]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 8 and len(nbformat.writes(notebook)) < 1_500_000
