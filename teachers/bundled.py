"""The teachers in weights/, which come along."""

import json
from dataclasses import replace
from pathlib import Path

from recipes import DATA_SETS, Images

BUNDLED = Path(__file__).parent.parent / "weights"


def find_bundled(settings: Images) -> Path | None:
    """The one that was made for these images and this ViT, if there is one."""
    if settings.image_size == DATA_SETS[settings.data].image_size:
        settings = replace(settings, image_size=0)
    for path in BUNDLED.glob("*.json"):
        if json.loads(path.read_text())["for"].items() <= vars(settings).items():
            return path.with_suffix(".pt")
    return None
