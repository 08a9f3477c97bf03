"""The tables of all pages, and their pictures, from study/results/*.json.

    python -m study.report

All intervals are computed anew, from the images that each run classified
correctly, or the accuracies of its seeds. What stands between <!-- NAME --> and
<!-- end --> is replaced by the table of that record.
"""

import json
import re
from functools import partial
from itertools import compress
from pathlib import Path

import numpy as np

from common import checkpoints, launch
from common.settings import Base, parse_settings
from study import estimates, figures, related_tables, tables
from study.engine import Table, estimate_correct
from study.estimates import BASELINE, CEILING, format_cell
from study.jobs import ROOT
from study.rows import COPY, DISTILLATION, MEAN, PAPER

TABLES = tables.TABLES | related_tables.TABLES
parse = partial(parse_settings, __doc__, Base, {})
RESULTS = ROOT / "study" / "results"
USUAL = ("mean", "interval", "values", "difference", "recovery")
PAGES = "README.md", "study/README.md", "related/README.md"
TASKS = {  # the records of each: a figure is from the first that has it
    "pointer": ("scenes-controls", "why-pointer"), "twins": ("scenes-twins",),
    "digits": ("fair-main", "why-digits"), "CIFAR-10": ("why-cifar10",),
    "photographs, DeiT": ("photos-128",),
}  # fmt: skip
TASK_ROWS = (COPY, MEAN, DISTILLATION, "distillation, mean maps", "beside")
MARKED = re.compile(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def recompute(record: dict, table: Table) -> dict:
    """The record with its intervals computed anew."""
    record = recompute_cells(record)
    if "correct" not in record:  # of tuning, or of maps
        return record
    correct = {
        point: {row: estimates.unpack(bits, record["images"]) for row, bits in of_rows.items()}
        for point, of_rows in record["correct"].items()
    }
    found = estimate_correct(correct, table.against, table.contrasts)
    for point, of_rows in found["points"].items():
        for row, cells in of_rows.items():
            record["points"][point][row].pop("recovery", None)
            record["points"][point][row] |= cells
    return record | {"contrasts": record["contrasts"] | found["contrasts"]}


def recompute_cells(cell):
    """The same for every figure of which the values of all seeds are known."""
    if not isinstance(cell, dict):
        return cell
    found = {name: recompute_cells(part) for name, part in cell.items()}
    if not (values := cell.get("values")):
        return found
    if isinstance(values[0], list):
        return found | estimates.estimate_layers(values)
    return found | estimates.estimate_over_seeds(np.array(values))


def fill_tables(text: str, results: Path) -> str:
    """The text with its marked tables replaced."""

    def replace_table(match: re.Match) -> str:
        if match[1] == "tasks":
            return f"<!-- tasks -->\n{format_tasks(results)}<!-- end -->"
        record = json.loads((results / f"{match[1]}.json").read_text())
        return f"<!-- {match[1]} -->\n{format_record(record)}<!-- end -->"

    return MARKED.sub(replace_table, text)


def format_tasks(results: Path) -> str:
    """A column for the paper and each task (its first point): the ends, recovery of some rows."""
    lines = [[row, f"{PAPER[row]} %"] for row in (BASELINE, CEILING)]
    for row in TASK_ROWS:
        known = f"{estimates.compute_share(PAPER, row, CEILING):.2f}" if row in PAPER else ""
        lines.append([f"recovery: {row}", known])
    for names in TASKS.values():
        cells: dict[str, dict] = {}
        for name in reversed(names):
            found, *_ = json.loads((results / f"{name}.json").read_text())["points"].values()
            cells |= found
        for line in lines[:2]:
            line.append(f"{cells[line[0]]['mean']:.1f} %")
        for row, line in zip(TASK_ROWS, lines[2:], strict=True):
            line.append(format_cell(cells.get(row, {}).get("recovery"), ".2f"))  # if it was run
    return format_table(["", "ImageNet-1K, ViT-L (the paper)", *TASKS], lines)


def format_record(record: dict) -> str:
    """A line for each row, or for each point if there are several; then the contrasts."""
    points, asked = record["points"], record.get("contrasts", {})
    (first, *others) = points.values()
    if "mean" not in next(iter(first.values())):
        return format_layers(first)
    table = format_points(points) if others else format_rows(first)
    return table + ("\n" + format_contrasts(asked, len(record["seeds"])) if asked else "")


def format_contrasts(asked: dict[str, dict], seeds: int) -> str:
    known = all(cell["interval"] for cell in asked.values())
    sure = "95 % interval" if known else f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    lines = [[name, format_cell(cell, "+.2f")] for name, cell in asked.items()]
    return format_table(["difference", sure], lines)


def format_rows(rows: dict[str, dict]) -> str:
    """Accuracy, recovery or the difference from another row, and further columns."""
    own = {name: None for found in rows.values() for name in found if name not in USUAL}
    cells = (found.get("difference") for found in rows.values())
    sources = [cell.get("from", BASELINE) for cell in cells if cell]
    usual = max(sources, key=sources.count, default=BASELINE)
    less = f"− {usual}" if len(set(sources)) < 2 else f"difference (− {usual}, if not said)"
    further = [name.replace("_", " ") for name in own]
    heads, lines = ["", "test top-1, %", less, "recovery", *further], []
    for row, found in rows.items():
        cell = found.get("difference", {})
        difference = format_cell(cell, "+.1f")
        if cell.get("from", usual) != usual:  # the head does not name it
            difference += f" (− {cell['from']})"
        recovery = "" if row == CEILING else format_cell(found.get("recovery"), ".2f")
        others = [format_cell(found.get(name), ".3g") for name in own]
        lines.append([row, format_cell(found, ".1f"), difference, recovery, *others])
    filled = [any(column) for column in zip(*lines, strict=True)]
    filled[2] &= not (filled[3] and less == f"− {BASELINE}")  # recovery and the picture say it
    (heads, *lines) = (list(compress(line, filled)) for line in (heads, *lines))
    return format_table(heads, lines)


def format_points(points: dict[str, dict]) -> str:
    """A line for each point: means, then the recoveries, or without any all differences."""
    rows = max(points.values(), key=len)
    what, form = ("recovery", ".2f") if CEILING in rows else ("difference", "+.1f")
    asked = [row for row in rows if row != CEILING and what in rows[row]]
    lines = [
        [point, *(f"{of_rows[row]['mean']:.1f}" if row in of_rows else "" for row in rows),
         *(format_cell(of_rows.get(row, {}).get(what), form) for row in asked)]
        for point, of_rows in points.items()
    ]  # fmt: skip
    return format_table(["", *rows, *(f"{what}: {row}" for row in asked)], lines)


def format_layers(rows: dict[str, dict[str, dict[str, list]]]) -> str:
    names = next(iter(rows.values()))
    lines = [
        [row, *(" ".join(f"{x:.2f}" for x in cells[name]["mean"]) for name in names)]
        for row, cells in rows.items()
    ]
    return format_table(["", *(name.replace("_", " ") for name in names)], lines)


def format_table(head: list[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *lines))


def write_record(record: dict, table: Table, path: Path) -> None:
    """And its picture beside it."""
    checkpoints.save(json.dumps(record, indent=1) + "\n", path)
    figures.draw_record(table, record, path)


def main(settings: Base) -> None:
    for path in sorted(RESULTS.glob("*.json")):
        if path.stem in TABLES:
            table = TABLES[path.stem]
            write_record(recompute(json.loads(path.read_text()), table), table, path)
    for page in map(ROOT.joinpath, PAGES):
        checkpoints.save(fill_tables(page.read_text(), RESULTS), page)
        print(f"wrote {page}")


if __name__ == "__main__":
    launch.run(main, parse)
