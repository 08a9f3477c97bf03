"""Draws the pictures of gallery/README.md, from this repository alone.

    python -m gallery.draw                      all of them
    python -m gallery.draw pointer.gif          one

All take two or three minutes on one core. Nothing is downloaded.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import look
from common import launch, pictures
from common.settings import Base, parse_settings, setting
from gallery.explorer import draw_explorer
from gallery.pointer import CENTRE, draw_pointer, load_images, open_bundled
from gallery.schematic import draw_schematic
from teachers.bundled import BUNDLED


@dataclass(frozen=True)
class Settings(Base):
    pictures: tuple[str, ...] = setting((), "which to draw [all]")
    out: str = setting("gallery", "folder of the pictures")


parse = partial(parse_settings, __doc__, Settings, {})


def draw_scenes(path: Path) -> None:
    """A scene: rows for the mean and each head of the teacher, columns for layers."""
    images = load_images("scenes", 1)
    model = open_bundled("scenes")
    maps = [qk.map() for _, qk in model.blockwise(images)]
    title = "Where the centre cell looks: a pointer scene, its teacher (weights/scenes.pt)"
    heads, layers = range(model.net.config.heads), range(model.net.config.depth)
    pictures.save(look.draw(model, images, maps, layers, heads, CENTRE, title), path)


def draw_digits(path: Path) -> None:
    images = load_images("digits", 4)
    model = open_bundled("digits")
    maps = [qk.map() for _, qk in model.blockwise(images)]
    looks = {f"layer {i}": pictures.mean_look(p, 1) for i, p in enumerate(maps)}
    title = "Where all patches look: test digits, their MAE (weights/digits.pt)"
    pictures.save(pictures.draw_overlays(images, looks, title=title), path)


def draw_house(path: Path) -> None:
    """A picture of 32 x 32 pixels, as look.py wants a photograph."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb

    y, x = np.mgrid[:32, :32] / 31
    parts = {  # colour: where
        "#3f8c33": y > 0.68,
        "#ffe64d": (x - 0.2) ** 2 + (y - 0.2) ** 2 < 0.011,
        "#eddfc7": (y > 0.45) & (y < 0.85) & (abs(x - 0.6) < 0.22),
        "#bf3326": (y > 0.2) & (y < 0.47) & (abs(x - 0.6) < y - 0.18),
        "#59331a": (y > 0.62) & (y < 0.85) & (abs(x - 0.6) < 0.06),
        "#668cbf": (y > 0.54) & (y < 0.66) & (abs(x - 0.46) < 0.04),
    }
    pixels = np.stack([0.45 + 0.3 * y, 0.65 + 0.2 * y, 0.95 - 0.05 * y], axis=-1)  # the sky
    for colour, where in parts.items():
        pixels[where] = to_rgb(colour)
    plt.imsave(path, pixels)


def draw_cifar10(path: Path) -> None:
    house = path.with_name("house.png")
    draw_house(house)
    argv = "--heads", "all", "--query", "2,4", "--out", str(path)
    look.main(look.parse([str(house), str(BUNDLED / "cifar10.pt"), *argv]))


PICTURES = {
    "pointer.gif": draw_pointer,
    "schematic.png": draw_schematic,
    "scenes.png": draw_scenes,
    "digits.png": draw_digits,
    "house.png": draw_house,
    "cifar10.png": draw_cifar10,
    "explorer.html": draw_explorer,
}


def main(settings: Settings) -> None:
    launch.require_one_process()
    if unknown := set(settings.pictures) - PICTURES.keys():
        raise ValueError(f"no picture {unknown.pop()}: choose from {', '.join(PICTURES)}")
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in settings.pictures or PICTURES:
        PICTURES[name](out / name)
        print(f"wrote {out / name}")


if __name__ == "__main__":
    launch.run(main, parse)
