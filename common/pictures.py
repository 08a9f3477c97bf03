"""Pictures: figures that are saved, and the curves of a run."""

from pathlib import Path

from common import checkpoints
from common.progress import NOT_SHOWN


def figure(rows: int = 1, columns: int = 1, width: float = 5.0, height: float = 3.2, **how):
    """A white figure, also in a dark notebook, and its axes."""
    import matplotlib.pyplot as plt

    size = (width, height)
    return plt.subplots(rows, columns, figsize=size, facecolor="white", layout="constrained", **how)


def save(fig, path: Path, dpi: int = 160) -> None:
    import matplotlib.pyplot as plt

    kind = path.suffix.removeprefix(".") or "png"
    checkpoints.write(path, lambda file: fig.savefig(file, dpi=dpi, format=kind))
    plt.close(fig)


def curves(rows: list[dict]):
    """The log of a run: the terms of its loss, what else is watched, and validation accuracy."""
    losses = [name for name in rows[0] if name not in NOT_SHOWN]
    scores = [name for name in rows[-1] if name.startswith("val_")]
    panels = {"loss": losses} | ({"validation top-1 (%)": scores} if scores else {})
    fig, axes = figure(1, len(panels), width=4.5 * len(panels), squeeze=False)
    for axis, (label, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            known = [row for row in rows if name in row]
            marker = "o" if len(known) == 1 else None  # one epoch is no line
            epochs, values = [row["epoch"] for row in known], [row[name] for row in known]
            axis.plot(epochs, values, label=name.replace("_", " "), marker=marker)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if label == "loss" and len(names) > 1:  # of different sizes
            axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    return fig
