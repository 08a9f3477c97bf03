"""Draws the pictures of gallery/README.md that need nothing but this repository.

    python -m gallery.draw                      all of them
    python -m gallery.draw pointer.gif          one

All take two or three minutes on one core. Nothing is downloaded.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import look
from common import launch, pictures
from common.settings import Base, parse_settings, setting
from gallery.explorer import draw_explorer
from gallery.pointer import CENTRE, draw_pointer, load_images, open_bundled
from gallery.schematic import draw_schematic


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


PICTURES = {
    "pointer.gif": draw_pointer,
    "schematic.png": draw_schematic,
    "scenes.png": draw_scenes,
    "digits.png": draw_digits,
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
