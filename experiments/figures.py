"""Pictures of comparisons: curves over layers, likeness of features, and what the study found."""

import textwrap
from collections.abc import Iterable, Iterator

import numpy as np

from pictures import figure

COLOURS = {  # of Okabe and Ito, which colour-blind eyes can tell apart
    "from scratch": "#999999",
    "attention copy": "#56B4E9",
    "attention distillation": "#0072B2",
    "fine-tuning": "#D55E00",
}
SPARE = ("#CC79A7", "#E69F00", "#009E73", "#F0E442")


# Over layers ------------------------------------------------------------------------------------


def lines(axis, series: dict[str, list[float]], label: str, title: str) -> None:
    """Curves over layers, one for each name."""
    for (name, values), colour in zip(series.items(), colours(series), strict=True):
        axis.plot(range(1, len(values) + 1), values, marker="o", label=name, color=colour)
    axis.set_ylim(bottom=-0.03 * axis.get_ylim()[1])  # a line at 0 is seen too
    over_layers(axis, len(values), label, title)


def colours(names: Iterable[str]) -> Iterator[str]:
    spare = iter(SPARE)
    return (COLOURS.get(name) or next(spare) for name in names)


def over_layers(axis, layers: int, label: str, title: str) -> None:
    axis.set(xlabel="layer", ylabel=label, title=title)
    axis.set_xticks(range(1, layers + 1, max(1, layers // 8)))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)


def divergences(layers: list[dict]):
    """How differently two ViTs look, layer by layer (`layers` of analysis.compare)."""
    fig, axis = figure()
    series = {
        "heads as they stand": [layer["divergence"] for layer in layers],
        "heads matched": [layer["matched"] for layer in layers],
    }
    lines(axis, series, "Jensen-Shannon divergence (nats)", "How differently A and B look")
    return fig


def heads(layers: list[dict]):
    """Entropy and distance of each head of two ViTs, layer by layer."""
    fig, axes = figure(1, 2, width=8)
    for axis, what, unit in zip(axes, ("entropy", "distance"), ("nats", "pixels"), strict=True):
        for side, (name, colour) in enumerate((("A", "#0072B2"), ("B", "#D55E00"))):
            for i, layer in enumerate(layers):
                spots = [i + 1 + 0.2 * side - 0.1] * len(layer[what][side])
                label = name if i == 0 else None
                axis.scatter(spots, layer[what][side], s=14, color=colour, label=label)
        over_layers(axis, len(layers), f"{what} ({unit})", f"Attention {what} of each head")
    return fig


def likeness(matrix: list[list[float]]):
    """CKA of A's layers and B's."""
    fig, axis = figure(width=4.2, height=4)
    heat(axis, matrix, ("A", "B"))
    axis.set_title("Likeness of features (linear CKA)")
    return fig


def heat(axis, matrix: list[list[float]], names: tuple[str, str]) -> None:
    """CKA of a's layers (down) and b's (across), as colours, with figures where there is room."""
    axis.imshow(matrix, vmin=0, vmax=1, cmap="cividis", origin="lower")
    for y, row in enumerate(matrix if len(matrix) <= 6 else []):
        for x, value in enumerate(row):
            colour = "white" if value < 0.5 else "black"
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    for ticks, length in ((axis.set_xticks, len(matrix[0])), (axis.set_yticks, len(matrix))):
        spots = range(0, length, max(1, length // 8))
        ticks(spots, [i + 1 for i in spots])
    axis.set(xlabel=f"layer of {names[1]}", ylabel=f"layer of {names[0]}")


# The study --------------------------------------------------------------------------------------

TRANSFER = ("attention copy", "attention distillation")


def along(axis, cells: dict[str, list[dict]], points: Iterable[str]) -> None:
    """Of each row its figures at the points of a table, with intervals; joined if these are
    amounts of something.
    """
    line = "-" if all(point[0].isdigit() for point in points) else "none"
    for i, ((row, of_row), colour) in enumerate(zip(cells.items(), colours(cells), strict=True)):
        shift = 0.06 * (i - (len(cells) - 1) / 2)  # so that intervals do not hide each other
        spots, means = np.arange(len(of_row)) + shift, [cell["mean"] for cell in of_row]
        how = dict(marker="o", linestyle=line, color=colour, capsize=2, label=row)
        axis.errorbar(spots, means, yerr=ends(of_row), **how)
    axis.set_xticks(range(len(spots)), [textwrap.fill(point, 11) for point in points])
    axis.spines[["top", "right"]].set_visible(False)


def ends(cells: list[dict]) -> list[list[float]]:
    """Intervals as distances below and above the means."""
    between = [cell["interval"] or [cell["mean"]] * 2 for cell in cells]  # none: no bar
    below = [cell["mean"] - low for cell, (low, _) in zip(cells, between, strict=True)]
    above = [high - cell["mean"] for cell, (_, high) in zip(cells, between, strict=True)]
    return [below, above]


def recovery(tables: dict[str, dict[str, dict]]):
    """What copy and distillation recover along each axis: a panel for each table's points."""
    fig, axes = figure(1, len(tables), width=3.6 * len(tables), squeeze=False)
    for axis, (title, points) in zip(axes[0], tables.items(), strict=True):
        for height, row in enumerate(("from scratch", "fine-tuning")):
            axis.axhline(height, color=COLOURS[row], label=row)
        cells = {row: [of_rows[row]["recovery"] for of_rows in points.values()] for row in TRANSFER}
        along(axis, cells, points)
        axis.set(title=title, ylim=(-0.2, 1.5))
    axes[0, 0].set_ylabel("recovery")
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
    return fig


def accuracies(points: dict[str, dict]):
    """The rows of a table: as dots with intervals, or, if it has several points, along these."""
    rows = next(iter(points.values()))
    if len(points) > 1:
        fig, axis = figure(width=7, height=3.6)
        along(axis, {row: [of_rows[row] for of_rows in points.values()] for row in rows}, points)
        axis.set_ylabel("test accuracy (top-1, %)")
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return fig
    fig, axis = figure(width=7.5, height=0.8 + 0.28 * len(rows))
    for y, (row, found) in enumerate(rows.items()):
        colour = COLOURS.get(row, "#333333")
        axis.errorbar(found["mean"], y, xerr=ends([found]), fmt="o", color=colour, capsize=2)
        between = found["interval"] or [found["mean"]] * 2
        axis.text(between[1], y, f"  {found['mean']:.1f}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    if scratch := rows.get("from scratch"):
        axis.axvline(scratch["mean"], color=COLOURS["from scratch"], linewidth=0.8)
    axis.set_xlabel("test accuracy (top-1, %), with 95 % intervals")
    axis.spines[["top", "right"]].set_visible(False)
    return fig
