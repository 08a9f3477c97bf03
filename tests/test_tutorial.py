"""The notebook: executed afresh from top to bottom, and what its cells print says what its prose says."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NUMBER = r"-?\d+\.\d+(?:e[-+]\d+)?"


def printed(notebook) -> str:
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert not [output.evalue for output in outputs if output.output_type == "error"]
    return "\n".join(
        output.text
        for output in outputs
        if output.output_type == "stream" and output.name == "stdout"
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """What the cells print when the notebook is run in a fresh copy of the repository."""
    here = tmp_path_factory.mktemp("course")
    for path in (*ROOT.glob("*.py"), ROOT / "digits.npz", ROOT / "tutorial.ipynb"):
        shutil.copy(path, here)
    shutil.copytree(ROOT / "results", here / "results")
    notebook = nbformat.read(here / "tutorial.ipynb", as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(here)}}).execute()
    return printed(notebook)


def row(text: str, name: str, after: str) -> list[float]:
    """The figures of the first line that begins with `name` behind the last line with the words `after`."""
    line = next(line for line in text[text.rindex(after) :].splitlines() if line.startswith(name))
    return [float(x) for x in re.findall(NUMBER, line)]


def test_lending_is_copying_and_the_gradient_is_as_derived(text):
    assert float(re.search(rf"largest difference ({NUMBER})", text)[1]) < 1e-5
    relative = [float(x) for x in re.findall(rf"largest relative difference ({NUMBER})", text)]
    assert len(relative) == 2 and max(relative) < 1e-10


def test_rows_are_in_the_order_that_the_prose_tells(text):
    after = "of fine-tuning's gain"
    start = text.rindex("from scratch", 0, text.index(after))
    rows = {
        name: float(re.search(rf"^{name} +test top-1 +({NUMBER})", text[start:], re.M)[1])
        for name in ("from scratch", "attention copy", "attention distillation", "fine-tuning")
    }
    assert rows["from scratch"] < rows["attention copy"] < rows["attention distillation"]
    assert rows["from scratch"] + 4 < min(rows["attention distillation"], rows["fine-tuning"])
    for name in ("fine-tuning + distillation", "fine-tuning twice"):
        one, other, both = row(text, name, "CKA with the fine-tuned")
        assert both > max(one, other) - 0.5
    untrained = row(text, "entropy", "its map")
    assert 0.95 * untrained[1] < untrained[0] <= untrained[1]


def test_maps_and_features_are_as_far_from_the_teachers_as_the_prose_tells(text):
    divergence = {
        name: row(text, name, "divergence from the teacher's maps")[::2]
        for name in ("attention copy", "attention distillation", "fine-tuning", "from scratch")
    }
    assert max(divergence["attention copy"][:3]) < 5e-4 and divergence["attention copy"][3] > 0.05
    for layer in range(3):
        assert divergence["attention distillation"][layer] < divergence["fine-tuning"][layer]
        assert divergence["fine-tuning"][layer] < divergence["from scratch"][layer] < 0.6932
    cka = {name: row(text, name, "CKA with the teacher's features") for name in divergence}
    assert all(-0.2 <= value <= 1.0001 for values in cka.values() for value in values)
    for layer in range(
        3
    ):  # copy: other features in spite of the same maps; distillation: much of the teacher's features
        assert cka["attention copy"][layer] + 0.2 < min(
            cka["attention distillation"][layer], cka["fine-tuning"][layer]
        )
        assert cka["from scratch"][layer] + 0.3 < cka["attention distillation"][layer]


def test_learned_maps_matter(text):
    trial = {
        name: row(text, name, "fine-tuning twice")[-1]
        for name in (
            "attention distillation",
            "random teacher",
            "from scratch",
            "first layer only",
            "third layer only",
        )
    }
    assert trial["random teacher"] - 2 < trial["from scratch"] < trial["attention distillation"] - 4
    assert trial["first layer only"] + 4 < trial["third layer only"]


def test_the_stored_notebook_is_whole_and_small():
    path = ROOT / "tutorial.ipynb"
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(
        range(1, len(cells) + 1)
    )  # run once, from top to bottom
    assert "attention distillation" in printed(notebook)
    pictures = [
        output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert 15 <= len(cells) <= 25 and len(pictures) >= 8 and path.stat().st_size < 1_500_000
