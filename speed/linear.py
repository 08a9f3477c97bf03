"""Linear against softmax attention: images/s over the number of tokens, and where they cross.

python -m speed.linear                a random ViT-S, as related/linear_attention.py makes it linear
"""

import launch
from launch import print0

import statistics
from functools import partial

import torch

import families
import pictures
from related.linear_attention import linearised
from settings import Settings, change, parse_settings, pick
from speed.measure import RECORD, Records, seconds
from vit import Config, ViT

SETTINGS = change(pick("device", "model", "patch"), model="small", patch=16) | RECORD
parse = partial(parse_settings, __doc__, SETTINGS)
TOKENS, AT_A_TIME, TIMES = (64, 256, 1024, 4096), 4096, 7  # AT_A_TIME: tokens of a batch


@torch.no_grad()
def speeds(settings: Settings, device: torch.device) -> dict[str, list[float]]:
    """Images/s in evaluation, without classes or registers, of both at each of TOKENS patches."""
    found = {"softmax": [], "linear": []}
    for tokens in TOKENS:
        side = round(tokens**0.5) * settings.patch
        config = Config(side, settings.patch, 3, 10, *families.size(settings.model))
        batch = torch.randn(max(1, AT_A_TIME // tokens), 3, side, side, device=device)
        nets = {"softmax": ViT(config), "linear": linearised(ViT(config))}
        took = {name: [] for name in nets}
        nets = {name: net.to(device).eval() for name, net in nets.items()}
        for _ in range(TIMES):
            for name, net in nets.items():
                took[name].append(seconds(partial(net, batch), device))
        for name, lasted in took.items():
            found[name].append(round(len(batch) / statistics.median(lasted[1:]), 3))
    return found


def draw(found: dict[str, list[float]]):
    fig, axis = pictures.figure()
    for name, of_tokens in found.items():
        axis.plot(TOKENS, of_tokens, marker="o", label=f"{name} attention")
    axis.set(xscale="log", yscale="log", xlabel="patches", ylabel="images/s")
    axis.set_xticks(TOKENS, TOKENS)
    axis.minorticks_off()
    axis.legend(frameon=False)
    return fig


def main(settings: Settings) -> dict:
    launch.one_process()
    device = launch.device(settings.device)
    records = Records(settings, device)
    found = speeds(settings, device)
    print0(f"{'patches':>8}  softmax   linear  images/s")
    for tokens, one, other in zip(TOKENS, found["softmax"], found["linear"], strict=True):
        print0(f"{tokens:>8} {one:8.2f} {other:8.2f}  {other / one:.2f} times as fast")
    if records.path:
        pictures.save(draw(found), records.path.with_name(f"linear-{device.type}.png"))
    about = {"tokens": TOKENS, "model": settings.model, "patch": settings.patch}
    return records.add("speed.linear", about | {"images_per_s": found})


if __name__ == "__main__":
    launch.run(main, parse)
