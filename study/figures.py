"""Pictures of the tables."""

import textwrap
from pathlib import Path

from common.pictures import figure, save

COLOURS = {  # of Okabe and Ito, which colour-blind eyes can tell apart
    "from scratch": "#999999", "attention copy": "#56B4E9",
    "attention distillation": "#0072B2", "fine-tuning": "#D55E00",
}  # fmt: skip
SPARE = ("#CC79A7", "#E69F00", "#009E73", "#F0E442", "#000000")


def draw_record(table, record: dict, path: Path) -> None:
    """A picture of an engine.Table's record beside it, if it holds nothing but accuracies."""
    if table.tunes or table.find:
        return
    points, several = record["points"], len(record["points"]) > 1
    rows = max(points.values(), key=len)
    seeds = [len(cell["values"]) for of_rows in points.values() for cell in of_rows.values()]
    title = f"{table.about} (seeds: {'at most ' * (min(seeds) < max(seeds))}{max(seeds)})"
    fig, axis = figure(width=8, height=3.8 if several else 1.3 + 0.28 * len(rows), title=title)
    draw_points(axis, points) if several else draw_differences(axis, rows)
    axis.spines[["top", "right"]].set_visible(False)
    save(fig, path.with_suffix(".png"))


def draw_points(axis, points: dict[str, dict]) -> None:
    """Each row at the points of a table, with intervals. Amounts are joined by lines."""
    line, spare = "-" if any(point[0].isdigit() for point in points) else "none", iter(SPARE)
    rows = max(points.values(), key=len)
    for i, row in enumerate(rows):
        shift = 0.06 * (i - (len(rows) - 1) / 2)  # so that intervals do not hide each other
        known = [(x + shift, of[row]) for x, of in enumerate(points.values()) if row in of]
        places, cells = zip(*known, strict=True)
        how = dict(marker="o", linestyle=line, color=COLOURS.get(row) or next(spare), capsize=2)
        means = [cell["mean"] for cell in cells]
        axis.errorbar(places, means, yerr=get_ends(cells), label=row, **how)
    axis.set_xticks(range(len(points)), [textwrap.fill(point, 11) for point in points])
    axis.set_ylabel("test accuracy (top-1, %)")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def get_ends(cells) -> list[list[float]]:
    """Intervals as distances below and above the means."""
    between = [cell["interval"] or [cell["mean"]] * 2 for cell in cells]  # none: no bar
    below = [cell["mean"] - low for cell, (low, _) in zip(cells, between, strict=True)]
    above = [high - cell["mean"] for cell, (_, high) in zip(cells, between, strict=True)]
    return [below, above]


def draw_differences(axis, rows: dict[str, dict]) -> None:
    """Paired differences with intervals, or a dash for each seed; at the left the accuracies."""
    sources = [cells["difference"]["from"] for cells in rows.values() if "difference" in cells]
    usual, names = max(sources, key=sources.count), []
    for y, (row, cells) in enumerate(rows.items()):
        cell = cells.get("difference", {"mean": 0.0, "interval": None, "values": [0.0]})
        colour, dots = COLOURS.get(row, "#333333"), [] if cell["interval"] else cell["values"]
        axis.errorbar(cell["mean"], y, xerr=get_ends([cell]), fmt="o", color=colour, capsize=2)
        axis.plot(dots, [y] * len(dots), "|", color=colour)
        other = f" (− {cell['from']})" if cell.get("from", usual) != usual else ""
        names.append(f"{row}{other}  {cells['mean']:.1f} %")
    axis.set_yticks(range(len(rows)), names)
    axis.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
    axis.axvline(0, color=COLOURS["from scratch"], linewidth=0.8)
    axis.set_xlabel(f"paired difference from '{usual}' (points of top-1)")
