"""The pages: links lead somewhere, figures are those of the records."""

import json
import re
from pathlib import Path

import pytest

from study.report import MARKED

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*.ipynb")]
PAGES = [page for page in PAGES if page.parent.name not in ("data", "runs", "scratch", ".venv")]


def read(page: Path) -> str:
    """The text of a page, of a notebook that of its markdown."""
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def list_anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL), re.M)
    kept = (re.sub(r"[^\w\- ]", "", head.lower()) for head in heads)
    return {head.replace(" ", "-") for head in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_relative_link_is_dead(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if link.startswith(("http", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in list_anchors(target), link


def test_the_figures_of_readme_are_those_of_the_records():
    """A share that the text names stands in a table. Of tables themselves see test_reproduce."""
    first = (ROOT / "README.md").read_text().split("\n## What we found")[1].split("\n## ")[0]
    tables = MARKED.finditer(first + (ROOT / "study" / "README.md").read_text())
    shares = re.findall(r"\b\d\.\d\d\b", MARKED.sub("", first))
    assert shares and set(shares) <= set(re.findall(r"\d\.\d\d\b", "".join(x[0] for x in tables)))
