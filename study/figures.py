"""Pictures of the tables."""

import textwrap
from pathlib import Path

from common.pictures import figure, save

COLOURS = {  # of Okabe and Ito, which colour-blind eyes can tell apart
    "from scratch": "#999999",
    "attention copy": "#56B4E9",
    "attention distillation": "#0072B2",
    "fine-tuning": "#D55E00",
}
SPARE = ("#CC79A7", "#E69F00", "#009E73", "#F0E442")


def draw_points(axis, cells: dict[str, dict[str, dict]], points: list[str]) -> None:
    """Each row at the points of a table, with intervals. Amounts are joined by lines."""
    line, spare = "-" if any(point[0].isdigit() for point in points) else "none", iter(SPARE)
    for i, (row, of_row) in enumerate(cells.items()):
        shift = 0.06 * (i - (len(cells) - 1) / 2)  # so that intervals do not hide each other
        places, known = [points.index(point) + shift for point in of_row], [*of_row.values()]
        means = [cell["mean"] for cell in known]
        colour = COLOURS.get(row) or next(spare)
        how = dict(marker="o", linestyle=line, color=colour, capsize=2, label=row)
        axis.errorbar(places, means, yerr=get_ends(known), **how)
    axis.set_xticks(range(len(points)), [textwrap.fill(point, 11) for point in points])


def get_ends(cells: list[dict]) -> list[list[float]]:
    """Intervals as distances below and above the means."""
    between = [cell["interval"] or [cell["mean"]] * 2 for cell in cells]  # none: no bar
    below = [cell["mean"] - low for cell, (low, _) in zip(cells, between, strict=True)]
    above = [high - cell["mean"] for cell, (_, high) in zip(cells, between, strict=True)]
    return [below, above]


def draw_record(table, record: dict, path: Path) -> None:
    """A picture of a study.Table's record beside it, if it holds accuracies."""
    if not (table.tunes or table.find):
        seeds = "1 seed" if len(record["seeds"]) == 1 else f"{len(record['seeds'])} seeds"
        title = f"{table.about} ({table.study.base['data']}, {seeds})"
        save(draw_accuracies(record["points"], title), path.with_suffix(".png"))


def draw_accuracies(points: dict[str, dict], title: str):
    """The rows of a table: lines along several points, or their differences at a single one."""
    rows = next(iter(points.values()))
    if len(points) > 1:
        fig, axis = figure(width=8, height=3.8, title=title)
        cells = {row: {p: of[row] for p, of in points.items() if row in of} for row in rows}
        draw_points(axis, cells, [*points])
        axis.set_ylabel("test accuracy (top-1, %)")
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        fig, axis = figure(width=8, height=1.3 + 0.28 * len(rows), title=title)
        draw_differences(axis, rows)
    axis.spines[["top", "right"]].set_visible(False)
    return fig


def draw_differences(axis, rows: dict[str, dict]) -> None:
    """Paired differences with intervals, or a dash for each seed; at the right the accuracies."""
    known = [cells.get("difference", {}) for cells in rows.values()]
    sources = [cell["from"] for cell in known if cell]
    usual, labels = max(sources, key=sources.count), []
    for y, ((row, found), cell) in enumerate(zip(rows.items(), known, strict=True)):
        cell = cell or {"mean": 0.0, "interval": None, "values": [0.0]}
        colour, dots = COLOURS.get(row, "#333333"), [] if cell["interval"] else cell["values"]
        axis.errorbar(cell["mean"], y, xerr=get_ends([cell]), fmt="o", color=colour, capsize=2)
        axis.plot(dots, [y] * len(dots), "|", color=colour)
        other = f"  (− {cell['from']})" if cell.get("from", usual) != usual else ""
        labels.append(f"{found['mean']:.1f} %{other}")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
    axis.axvline(0, color=COLOURS["from scratch"], linewidth=0.8)
    right = axis.secondary_yaxis("right")
    right.set_yticks(range(len(rows)), labels, fontsize=9)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    axis.set_xlabel(f"paired difference from '{usual}' (points of top-1; right: top-1)")
