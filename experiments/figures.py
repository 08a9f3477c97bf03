"""Pictures of comparisons: curves over layers, likeness of features, and the table of results."""

from pictures import figure

COLOURS = {  # of Okabe and Ito, which colour-blind eyes can tell apart
    "teacher": "#000000",
    "from scratch": "#999999",
    "attention copy": "#56B4E9",
    "attention distillation": "#0072B2",
    "fine-tuning": "#D55E00",
    "ensemble": "#009E73",
}


# Over layers ------------------------------------------------------------------------------------


def lines(axis, series: dict[str, list[float]], label: str, title: str) -> None:
    """Curves over layers, one for each name."""
    spare = iter(("#CC79A7", "#E69F00", "#009E73", "#F0E442"))
    for name, values in series.items():
        colour = COLOURS.get(name) or next(spare)
        axis.plot(range(1, len(values) + 1), values, marker="o", label=name, color=colour)
    axis.set_ylim(bottom=0)
    over_layers(axis, len(values), label, title)


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


# The table of results ---------------------------------------------------------------------------


def cell(found: dict) -> str:
    return f"{found['mean']:.1f}" + (f" ± {found['std']:.1f}" if found["std"] is not None else "")


def table(result: dict):
    """The rows as bars; layer by layer, how far their maps and features are from the teacher's."""
    fig, (bars, *others) = figure(1, 3, width=13.5, height=3.6, width_ratios=(4, 3, 3))
    for y, (row, found) in enumerate(result["rows"].items()):
        colour = COLOURS.get(row, COLOURS["ensemble"] if "+" in row else "#DDDDDD")
        bars.barh(
            y, found["mean"], xerr=found["std"] or 0, color=colour, ecolor="#333333", capsize=2
        )
        dark = row in ("attention distillation", "fine-tuning")
        bars.text(1, y, f" {cell(found)}", va="center", color="white" if dark else "black")
    bars.set_yticks(range(len(result["rows"])), result["rows"])
    bars.invert_yaxis()
    bars.set(
        xlabel="test accuracy (top-1, %)",
        xlim=(0, 100),
        title="What is transferred, and how well it works",
    )
    bars.spines[["top", "right"]].set_visible(False)
    panels = (
        ("divergence", "divergence from the teacher's (nats)", "Distance of maps"),
        ("cka", "CKA with the teacher's", "Likeness of features"),
    )
    for axis, (what, label, title) in zip(others, panels, strict=True):
        likeness_of = result["likeness_to_teacher"].items()
        lines(
            axis,
            {row: [x["mean"] for x in found[what]] for row, found in likeness_of},
            label,
            title,
        )
    others[1].set_ylim(0, 1.02)
    others[1].get_legend().remove()  # it is that of the panel beside it
    return fig
