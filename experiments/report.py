"""The tables of every README.md, written from results/*.json.

    python -m experiments.report

What stands between <!-- NAME --> and <!-- end --> is replaced by the table of
results/NAME.json, so that no figure of the text is written by hand.
"""

import launch

import json
import re
from functools import partial
from itertools import compress
from pathlib import Path

import storage
from experiments.estimates import BASELINE, CEILING
from experiments.jobs import ROOT
from settings import Settings, parse_settings

SETTINGS: dict = {}
parse = partial(parse_settings, __doc__, SETTINGS)
USUAL = ("mean", "interval", "values", "difference", "recovery")
PAGES = tuple(ROOT / folder / "README.md" for folder in (".", "experiments", "related"))
MARKED = re.compile(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def read(path: Path) -> dict:
    """A record. ValueError that names it if it is damaged; OSError if there is none."""
    try:
        record = json.loads(path.read_text())
        return record | {"points": dict(record["points"])}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it (git checkout)") from error


def written(text: str, results: Path) -> str:
    """The text, with its marked tables made anew."""

    def table(match: re.Match) -> str:
        record = read(results / f"{match[1]}.json")
        return f"<!-- {match[1]} -->\n{markdown(record)}<!-- end -->"

    return MARKED.sub(table, text)


def markdown(record: dict) -> str:
    """A line for each row, or for each point if there are several; then the contrasts."""
    points, asked = record["points"], record.get("contrasts", {})
    (first, *others) = points.values()
    if "mean" not in next(iter(first.values())):
        return of_layers(first)
    table = along(points) if others else at_one_point(first)
    return table + ("\n" + contrasts(asked) if asked else "")


def contrasts(asked: dict[str, dict]) -> str:
    """What is asked of several rows; of several points, with the first and the last in the head."""
    head, ends = "difference", {name.partition(": ")[2] for name in asked}
    if len(ends) == 1 and " → " in (end := ends.pop()):
        head = f"change from {end.replace(' → ', ' to ')}"
        asked = {name.removesuffix(f": {end}"): cell for name, cell in asked.items()}
    sure = "95 % interval" if all(cell.get("interval") for cell in asked.values()) else "one seed"
    return lined([head, sure], [[name, shown(cell, "+.2f")] for name, cell in asked.items()])


def at_one_point(rows: dict[str, dict]) -> str:
    """Accuracy, difference from scratch or another row, recovery, and what else is known."""
    own = {name: None for found in rows.values() for name in found if name not in USUAL}
    cells = (found.get("difference") for found in rows.values())
    sources = [cell.get("from", BASELINE) for cell in cells if cell]
    usual = max(sources, key=sources.count, default=BASELINE)
    heads = [
        "",
        "test top-1, %",
        f"− {usual}" if len(set(sources)) < 2 else f"difference (− {usual}, if not said)",
        "recovery",
        *(name.replace("_", " ") for name in own),
    ]
    lines = [
        [row, shown(found, ".1f"), difference(found.get("difference"), usual),
         shown(found.get("recovery"), ".2f"), *(shown(found.get(name), ".3g") for name in own)]
        for row, found in rows.items()
    ]  # fmt: skip
    filled = [any(column) for column in zip(*lines, strict=True)]
    (heads, *lines) = (list(compress(line, filled)) for line in (heads, *lines))
    return lined(heads, lines)


def difference(cell: dict | None, usual: str) -> str:
    """With what it is from, if that is not what the head says."""
    source = (cell or {}).get("from", usual)
    return shown(cell, "+.1f") + ("" if source == usual else f" (− {source})")


def along(points: dict[str, dict]) -> str:
    """Means of the rows; of those compared with other rows than BASELINE the differences.

    If none is, what they recover; or if none does, all differences.
    """
    rows = next(iter(points.values()))
    gains = {row: cells["difference"] for row, cells in rows.items() if "difference" in cells}
    others = {row: cell.get("from", BASELINE) for row, cell in gains.items()}
    compared = {f"{row} − {other}": row for row, other in others.items() if other != BASELINE}
    recovered = {
        f"recovery: {row}": row for row in rows if row != CEILING and "recovery" in rows[row]
    }
    gained = {f"difference: {row}": row for row in gains if row != BASELINE}
    asked = compared or recovered or gained
    what, form = ("recovery", ".2f") if asked is recovered else ("difference", "+.1f")
    lines = [
        [point, *(f"{of_rows[row]['mean']:.1f}" for row in rows),
         *(shown(of_rows[row][what], form) for row in asked.values())]
        for point, of_rows in points.items()
    ]  # fmt: skip
    return lined(["", *rows, *asked], lines)


def of_layers(rows: dict[str, dict[str, dict[str, list]]]) -> str:
    names = next(iter(reversed(rows.values())))
    lines = [
        [row, *(means(found[name]) if name in found else "" for name in names)]
        for row, found in rows.items()
    ]
    return lined(["", *(name.replace("_", " ") for name in names)], lines)


def means(cell: dict[str, list]) -> str:
    return " ".join(f"{x:.2f}" for x in cell["mean"])


def lined(head: list[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *lines))


def shown(cell: dict | int | None, form: str) -> str:
    """A figure and its 95 % interval, or a count."""
    if not cell:
        return ""
    if isinstance(cell, int):
        return f"{cell:,}"
    between = cell.get("interval")
    ends = f" [{between[0]:{form}}, {between[1]:{form}}]" if between else ""
    return format(cell["mean"], form) + ends


def main(settings: Settings) -> None:
    for page in PAGES:
        storage.write_text(page, written(page.read_text(), ROOT / "results"))
        print(f"wrote {page}")


if __name__ == "__main__":
    launch.run(main, parse)
