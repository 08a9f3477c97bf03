"""The methods side by side: what a teacher lends, what a student learns, what a test needs."""

from pathlib import Path

from common import pictures
from study.figures import COLOURS
from study.rows import PAPER

LENT, LEARNED, BOTH = "#ffd27a", "#9cc9ea", "#ffd27a #9cc9ea"  # of boxes: where, then what
WIDE, HIGH, APART = 0.73, 0.46, 0.21  # a box, and half the way from teacher to student, in inches
TEXT, SMALL = 12.5, 11.5
METHODS = {  # the student, arrows from the teacher and their name; in training, in the test
    "from scratch": ((LEARNED, LEARNED), "", "", "learns everything", "student alone"),
    "attention\ncopy": ((LENT, LEARNED), "->", "maps", "uses the maps", "teacher needed"),
    "attention\ndistillation": (
        (LEARNED, LEARNED), "<->", "loss", "imitates the maps", "teacher thrown away",
    ),
    "fine-tuning": ((BOTH, BOTH), "->", "", "starts as the teacher", "student alone"),
}  # fmt: skip
MIDDLES = 1.13, 2.99, 5.14, 7.31  # of the columns
SOURCE = "top-1 on ImageNet-1K, ViT-L, MAE teacher: the paper's figures"
LEGEND = {LENT: "the teacher's, frozen", LEARNED: "learned", BOTH: "the teacher's, then learned"}
WORDS = "where: attention maps (queries, keys)       what: values, MLPs, embeddings"


def draw_schematic(path: Path) -> None:
    fig, axis = pictures.figure(width=8.4, height=5.35)
    axis.set(xlim=(0, 8.4), ylim=(0, 5.35), aspect="equal")
    axis.axis("off")
    for y, name in ((3.78, "training"), (2.12, "test")):
        write(axis, 0.15, y, name, 13.5, rotation=90)
    axis.plot((0.35, 8.38), (2.98, 2.98), color="0.8", linewidth=1)
    for column, (name, (student, arrow, word, training, test)) in enumerate(METHODS.items()):
        middle, row = MIDDLES[column], name.replace("\n", " ")
        colour = COLOURS[row]
        copied = student[0] is LENT
        write(axis, middle, 5.04, name, 14, color=colour, weight="bold")
        draw_nets(axis, middle, 3.4, student, arrow, word)
        write(axis, middle, 3.19, training)
        draw_nets(axis, middle, 1.76, student, arrow if copied else "", word)
        write(axis, middle, 1.55, test)
        write(axis, middle, 1.15, f"{PAPER[row]} %", 16, color=colour, weight="bold")
    write(axis, 4.37, 0.86, SOURCE, SMALL)
    for x, (colour, words) in zip((0.72, 3.3, 4.85), LEGEND.items(), strict=True):
        draw_box(axis, x, 0.43, 0.3, 0.2, colour)
        write(axis, x + 0.38, 0.52, words, ha="left")
    write(axis, 4.37, 0.15, WORDS)
    pictures.save(fig, path)


def draw_nets(axis, middle: float, y: float, student: tuple, arrow: str, word: str) -> None:
    """The student. With an arrow also the teacher, left of it."""
    draw_net(axis, middle + APART if arrow else middle - WIDE / 2, y, "student", *student)
    if not arrow:
        return
    draw_net(axis, middle - APART - WIDE, y, "teacher", LENT, LENT)
    write(axis, middle, y + HIGH / 2 + 0.14, word, 10)
    for height in (y + HIGH / 2, y + 1.5 * HIGH)[: 1 if word else 2]:
        how = dict(arrowstyle=arrow, linewidth=2, mutation_scale=13, shrinkA=0, shrinkB=0)
        axis.annotate("", (middle + APART, height), (middle - APART, height), arrowprops=how)


def draw_net(axis, x: float, y: float, name: str, where: str, what: str) -> None:
    write(axis, x + WIDE / 2, y + 2 * HIGH + 0.14, name)
    for height, colour, word in ((y, where, "where"), (y + HIGH, what, "what")):
        draw_box(axis, x, height, WIDE, HIGH, colour)
        write(axis, x + WIDE / 2, height + HIGH / 2, word)


def draw_box(axis, x: float, y: float, wide: float, high: float, colours: str) -> None:
    """A box of one colour, or of two from its left to its right."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    first, *_, last = colours.split() * 2
    blend, whole = LinearSegmentedColormap.from_list("", (first, last)), (x, x + wide, y, y + high)
    axis.imshow([[0, 1]], extent=whole, cmap=blend, interpolation="bilinear")
    axis.add_patch(Rectangle((x, y), wide, high, fill=False, linewidth=1.2))


def write(axis, x: float, y: float, words: str, size: float = TEXT, **how) -> None:
    axis.text(x, y, words, va="center", fontsize=size, **{"ha": "center"} | how)
