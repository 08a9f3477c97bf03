"""Linear against softmax attention: images/s over the number of tokens, and where they cross.

python -m speed.linear                a random ViT-S, as related/linear_attention.py makes it linear
"""

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from common import launch, pictures
from common.launch import print0
from common.settings import parse_settings, setting
from recipes import SIZES
from related.linear_attention import linearise
from speed import measure
from vit import Config, ViT


@dataclass(frozen=True)
class Settings(measure.Settings):
    model: str = setting("small", "size of the ViT", SIZES)
    patch: int = setting(16, "pixels per side of a patch", low=1)


parse = partial(parse_settings, __doc__, Settings, {})
TOKENS, AT_A_TIME, TIMES = (64, 256, 1024, 4096), 4096, 7  # AT_A_TIME: tokens of a batch


@torch.no_grad()
def measure_speeds(settings: Settings, device: torch.device) -> dict[str, list[float]]:
    """Images/s in evaluation, for each of TOKENS patches, of softmax and of linear attention."""
    found = {"softmax": [], "linear": []}
    for tokens in TOKENS:
        side = round(tokens**0.5) * settings.patch
        config = Config(side, settings.patch, 3, 10, *SIZES[settings.model])
        batch = torch.randn(max(1, AT_A_TIME // tokens), 3, side, side, device=device)
        nets = {"softmax": ViT(config), "linear": linearise(ViT(config))}
        times = {name: [] for name in nets}
        nets = {name: net.to(device).eval() for name, net in nets.items()}
        for _ in range(TIMES):
            for name, net in nets.items():
                times[name].append(measure.measure_seconds(partial(net, batch), device))
        for name, took in times.items():
            found[name].append(round(len(batch) / statistics.median(took[1:]), 3))
    return found


def draw(found: dict[str, list[float]], title: str):
    fig, axis = pictures.figure(title=title)
    for name, speeds in found.items():
        axis.plot(TOKENS, speeds, marker="o", label=f"{name} attention")
    axis.set(xscale="log", yscale="log", xlabel="patches", ylabel="images/s")
    axis.set_xticks(TOKENS, TOKENS)
    axis.minorticks_off()
    axis.legend(frameon=False)
    return fig


def main(settings: Settings) -> dict:
    launch.require_one_process()
    device = launch.get_device(settings.device)
    found = measure_speeds(settings, device)
    print0(f"{'patches':>8}  softmax   linear  images/s")
    for tokens, one, other in zip(TOKENS, found["softmax"], found["linear"], strict=True):
        print0(f"{tokens:>8} {one:8.2f} {other:8.2f}  {other / one:.2f} times as fast")
    about = {"tokens": TOKENS, "model": settings.model, "patch": settings.patch}
    record = measure.add_record(settings, device, "speed.linear", about | {"images_per_s": found})
    if settings.record:
        title = f"Softmax and linear attention (ViT-{settings.model}, {record['device']})"
        pictures.save(draw(found, title), Path(settings.results) / f"linear-{device.type}.png")
    return record


if __name__ == "__main__":
    launch.run(main, parse)
