"""Scenes of four digits, two of them even, and reminders of one: for related/reminders.py."""

import random
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = "zero one two three four five six seven eight nine".split()
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
BESIDE = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
KNOWN = (  # phrasings heard in training, where "one" means a digit
    "the {what}", "look at the {what}", "it is the {what}", "take the {what} please",
    "not that but the {what}", "{row} {column}", "look at the {row} {column}",
    "no what is at the {row} {column}", "over there at the {row} {column}",
    "the {what} at the {row} {column}", "the {row} {column} please", "look {beside} the {other}",
    "the thing {beside} the {other}", "it is {beside} the {other}", "no {beside} the {other}",
)  # fmt: skip
NEW = (
    "you want the {what}", "no wait the {what} instead", "try the {row} {column} corner",
    "at the {row} {column} i think", "what lies {beside} the {other}",
    "not there {beside} the {other}",
)  # fmt: skip
NOTHING, UNKNOWN = 0, 1
HEARD = {*NAMES, *ROWS, *COLUMNS, *" ".join((*KNOWN, *BESIDE)).split()}  # in training
HEARD = sorted(word for word in HEARD if "{" not in word)
VOCABULARY = {word: number for number, word in enumerate(HEARD, 2)}
LONGEST = 10  # words of a reminder
PLACE = 10  # pixels per side of each of nine places


def remind(scene: dict[int, int], target: int, phrasings: tuple[str, ...], draw) -> str:
    """A reminder of where the target lies. `scene`: digits by their places, 0 to 8."""
    row, column = divmod(target, 3)
    facts = {"what": NAMES[scene[target]], "row": ROWS[row], "column": COLUMNS[column]}
    beside = [
        {"beside": words, "other": NAMES[scene[3 * (row + y) + column + x]]}
        for words, (y, x) in BESIDE.items()
        if 0 <= row + y < 3 and 0 <= column + x < 3 and 3 * (row + y) + column + x in scene
    ]
    fitting = [said for said in phrasings if beside or "{beside}" not in said]
    return draw.choice(fitting).format(**facts, **(draw.choice(beside) if beside else {}))


def number_words(reminder: str, draw, unheard: float) -> list[int]:
    """Its words as numbers. Some, drawn by chance, are not understood."""
    words = [UNKNOWN if draw.random() < unheard else VOCABULARY.get(word, UNKNOWN)
             for word in reminder.split()]  # fmt: skip
    return words + [NOTHING] * (LONGEST - len(words))


class Scenes(NamedTuple):
    pictures: Tensor  # (n, 1, 30, 30) in 0..1
    targets: Tensor  # (n,): the place to go to
    words: Tensor  # (n, LONGEST)
    said: list[str]


def make_scenes(
    count: int, images: Tensor, labels: Tensor, phrasings: tuple[str, ...], seed, unheard: float = 0
) -> Scenes:
    """Scenes of these digits (m, 8, 8), with a reminder each. `unheard`: share of its words."""
    draw, kinds = random.Random(seed), labels.tolist()
    of_kind = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in range(10)}
    drawn, targets, said = torch.zeros(count, 1, 3 * PLACE, 3 * PLACE), [], []
    for picture in drawn:
        lying = draw.sample(range(0, 10, 2), 2) + draw.sample(range(1, 10, 2), 2)
        scene = dict(zip(draw.sample(range(9), 4), lying, strict=True))
        for place, kind in scene.items():
            y, x = (PLACE * line + draw.randrange(PLACE - 7) for line in divmod(place, 3))
            picture[0, y : y + 8, x : x + 8] = images[draw.choice(of_kind[kind])]
        targets.append(next(iter(scene)))
        said.append(remind(scene, targets[-1], phrasings, draw))
    words = torch.tensor([number_words(reminder, draw, unheard) for reminder in said])
    return Scenes(drawn, torch.tensor(targets), words, said)
