"""Which output of a ViT stands for which class of a folder."""

import re
import unicodedata

from torchvision.models import ViT_B_16_Weights

from common.launch import print0

IMAGENET = list(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"])  # words, in the usual order
NUMBERS = [str(i) for i in range(1000)]


def number_imagenet(names: list[str]) -> list[str]:
    """Words, WordNet ids or numbers of ImageNet's 1,000 classes, as numbers. [] for other names."""
    ids = sorted(name for name in names if re.fullmatch(r"n\d{8}", name))
    for order in (IMAGENET, NUMBERS, ids):
        if len(order) == 1000 and set(order) == set(names):
            return [str(order.index(name)) for name in names]
    return []


def match_classes(model, classes: list[str]) -> list[int]:
    """The outputs of a load.Model for these classes, which may be some of its own.

    A file that names none has them in the order of the folders' names: a ValueError if 10 and 2
    are among these, as some sort them as texts and some as numbers.
    """
    found, outputs = model.checkpoint, model.net.config.classes
    if found.method == "pretrain" or not outputs:
        raise ValueError(f"{found.source} is no classifier: fine-tune it first")
    known = found.classes or sorted(classes, key=split_numbers)
    known = [unicodedata.normalize("NFC", name) for name in known]  # as datasets/folders.py
    if not found.classes and known != classes and set(classes) != set(NUMBERS):
        orders = " or ".join(", ".join(order[:3]) for order in (known, classes))
        remedy = "rename the folders, so that they sort as its outputs (01, 02)"
        raise ValueError(f"{found.source} names no classes, are they {orders}? {remedy}")
    if not found.classes:
        print0(f"note: {found.source} names no classes: {known[0]} to {known[-1]}, in this order?")
    words = [[x.replace("_", " ") for x in names] for names in (known, classes)]
    numbers = number_imagenet(known), number_imagenet(classes)
    for ours, theirs in (known, classes), words, numbers:
        if theirs and set(theirs) <= set(ours) and len(ours) == outputs:
            return [ours.index(name) for name in theirs]
    strange = ", ".join(sorted({*words[1]} - {*words[0]})[:3]) or len(classes)
    own = f"are such as {known[0]}, and capitals count" if found.classes else "have no names"
    reason = f"does not know these classes ({strange}): its {outputs} outputs {own}"
    raise ValueError(f"{found.source} {reason}")


def split_numbers(name: str) -> list:  # to sort as people do: 2 before 10
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
