"""What an MAE makes of patches that it does not see.

python -m gallery.reconstruct runs/pretrain-digits-micro-s0 out.png
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from einops import rearrange, repeat
from torch import Tensor

import data
import pretrain
from common import checkpoints, launch, pictures
from common.settings import Base, get_values, parse_settings, setting


@dataclass(frozen=True)
class Settings(Base):
    paths: tuple[str, ...] = setting((), "the run of an MAE, and a picture", low=2, high=2)


parse = partial(parse_settings, __doc__, Settings, {})


@torch.no_grad()
def reconstruct(mae: pretrain.MAE, images: Tensor):
    """A matplotlib figure: images, what the encoder sees of them, what the decoder makes of it."""
    patches, mask = mae(images)
    if mae.norm_pix_loss:  # the decoder does not know a patch's statistics: the original's
        own = pretrain.patchify(mae.encoder.normalise(images), mae.config.patch)
        mean, deviation = pretrain.get_statistics(own)
        patches = patches * deviation + mean
    fold = dict(h=mae.config.grid_size, p=mae.config.patch, q=mae.config.patch)
    patches = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", **fold)
    masked = repeat(mask, "b (h w) -> b 1 (h p) (w q)", **fold)
    guess = (patches * mae.encoder.std + mae.encoder.mean).clamp(0, 1)
    rows = {
        "original": images,
        "visible": images * (1 - masked) + 0.6 * masked,
        "reconstructed": images * (1 - masked) + guess * masked,
    }
    figure, axes = pictures.figure(3, len(images), len(images), 3.2, squeeze=False)
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, row.cpu(), strict=True):
            axis.imshow(rearrange(picture, "c h w -> h w c").expand(-1, -1, 3).numpy())
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    return figure


def main(settings: Settings) -> None:
    run, picture = map(Path, settings.paths)
    checkpoints.check_place(picture, "the picture", ".png", ".pdf", ".svg")
    found, usual = json.loads((run / "config.json").read_text()), pretrain.parse([])
    if found.get("target") != "masked":
        raise ValueError(f"{run} is no run of an MAE (python pretrain.py --data digits)")
    own = replace(usual, **{name: found[name] for name in get_values(usual)})
    dataset = data.load(own)
    mae = pretrain.build(own, dataset)
    mae.load_state_dict(checkpoints.read_file(run / "last.pt")["net"])
    images, _ = next(dataset.test.in_order(8))
    pictures.save(reconstruct(mae.eval(), images), picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    launch.run(main, parse)
