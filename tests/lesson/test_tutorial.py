"""The notebooks: executed afresh from top to bottom, their checks passed, stored whole.

python -m tests.lesson.test_tutorial      executes and stores them, in minutes
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
TUTORIAL, SOLUTIONS = ROOT / "tutorial.ipynb", ROOT / "solutions.ipynb"
EXECUTED = ROOT / "gallery" / "tutorial_executed.ipynb"
NUMBER = r"-?\d+\.\d+(?:e[-+]\d+)?"


def read(path: Path):
    return nbformat.read(path, as_version=4)


def list_code(path: Path) -> list:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def printed(notebook) -> str:
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert not [out.evalue for out in outputs if out.output_type == "error"]
    return "".join(out.text for out in outputs if out.get("name") == "stdout")


def find_checks(path: Path) -> dict[str, str]:
    """The asserts of each exercise."""
    pattern = r"with exercise\((\d+)\):\n( .*\n?)+"
    found = (re.search(pattern, cell.source) for cell in list_code(path))
    return {match[1]: match[0].strip() for match in found if match}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """What the notebooks need, and no more: they import nothing of the study."""
    here = tmp_path_factory.mktemp("course")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, here)
    for folder in ("common", "datasets", "teachers", "study", "weights"):
        shutil.copytree(ROOT / folder, here / folder)
    (here / "gallery").mkdir()
    shutil.copy(ROOT / "gallery" / "explorer.html", here / "gallery")
    return here


def execute(path: Path, here: Path, shorter: bool):
    """The executed notebook. `shorter`: its scripts train for two epochs."""
    notebook = read(path)
    for cell in notebook.cells if shorter else ():
        cell.source = cell.source.replace('"--resume", *argv]', '"--resume", *argv, "--epochs=2"]')
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(here)}}).execute()
    return notebook


def row(text: str, name: str) -> list[float]:
    """The figures of the first line that begins with `name`."""
    (found, *_) = (line for line in text.splitlines() if line.startswith(name))
    return [float(x) for x in re.findall(NUMBER, found)]


@pytest.mark.slow
def test_the_tutorial_shows_what_it_says_and_every_exercise_fails_until_it_is_solved(copy):
    text = printed(execute(TUTORIAL, copy, shorter=True))
    assert float(re.search(r"the output differs by up to (\S+)", text)[1]) < 1e-5
    assert max(row(text, "all q and k rotated") + row(text, "the map itself")) < 1e-3
    assert min(row(text, "q and k, without a bias") + row(text, "q and k in heads")) > 0.01
    pull, squared = row(text, "a student's row, sure and wrong")
    assert pull == pytest.approx(2**0.5, rel=0.01) and squared < 0.01  # P_S - P_T, and its loss
    total, classes, floor, divergence = row(text, "at the end")
    assert total == pytest.approx(classes + 9 * (floor + divergence), abs=0.01)
    numbers = find_checks(TUTORIAL)
    assert re.findall(r"Exercise (\d+): not solved yet", text) == list(numbers)
    solved = printed(execute(SOLUTIONS, copy, shorter=True))
    assert re.findall(r"Exercise (\d+): solved", solved) == list(numbers)


def test_the_solutions_have_the_asserts_of_the_exercises():
    checks = find_checks(TUTORIAL)
    assert checks == find_checks(SOLUTIONS) and len(checks) >= 6


def test_the_first_cell_finds_the_scripts_or_asks_for_them(copy, tmp_path):
    first = list_code(TUTORIAL)[0].source

    def run(typed: str = "") -> str:  # the folder that the cell ends in
        how = dict(cwd=tmp_path, input=typed, capture_output=True, text=True)
        code = [sys.executable, "-c", f"{first}\nprint('\\n', os.getcwd())"]
        return subprocess.run(code, **how).stdout.split()[-1:]

    shutil.make_archive(str(tmp_path / "course"), "zip", copy.parent, copy.name)
    assert not Path(*run("nowhere\n")).is_dir()
    assert run("course.zip\n") == run() == [str(tmp_path / copy.name)]  # fetched once, then found


@pytest.mark.parametrize("path", [EXECUTED, SOLUTIONS])
def test_the_executed_notebook_is_whole_and_small(path):
    cells = list_code(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # in order
    assert not re.search("Warning|/tmp|/home|/root|/work", printed(read(path)))
    outputs = [out for cell in cells for out in cell.outputs]
    assert not [out.text for out in outputs if out.get("name") == "stderr"]
    assert len(nbformat.writes(read(path))) < 1_500_000


def test_the_tutorial_leaves_guesses_open_and_its_executed_copy_is_of_today():
    assert not [cell for cell in list_code(TUTORIAL) if cell.outputs]
    today = [cell.source for cell in aim_links(read(TUTORIAL)).cells]
    assert today == [cell.source for cell in read(EXECUTED).cells]


def aim_links(notebook):
    """Links of a page of the root, for its copy in gallery/."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((?!http)(\S+)\)", r"](../\1)", cell.source)
    return notebook


def store() -> None:
    shutil.rmtree(ROOT / "runs" / "tutorial", ignore_errors=True)
    for path, target in ((TUTORIAL, EXECUTED), (SOLUTIONS, SOLUTIONS)):
        notebook = execute(path, ROOT, shorter=False)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if "explorer.html" in cell.source and cell.cell_type == "code":
                cell.outputs = []  # the page: a megabyte
        nbformat.write(aim_links(notebook) if target == EXECUTED else notebook, target)


if __name__ == "__main__":
    store()
