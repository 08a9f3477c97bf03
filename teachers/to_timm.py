"""Our ViTs as timm's.

>>> net = timm.create_model(name, num_classes=10, global_pool="avg")
>>> net.load_state_dict(to_timm(load.open_model(path), net))
"""

import copy
import re

import torch
from torch import Tensor, nn


@torch.no_grad()
def to_timm(model, theirs: nn.Module) -> dict[str, Tensor]:
    """The weights of a load.Model for a ViT of timm's, whose names and shapes decide.

    What timm's has no tensor for is moved to where it does the same. ValueError if timm's computes
    something else, or if the model needs its teacher's maps.
    """
    if model.teacher:
        raise ValueError("a student of attention copy needs its teacher's maps: timm's take none")
    net, target, found = model.net, theirs.state_dict(), dict(model.net.state_dict())
    if "pos_embed" in found:
        positions = found["pos_embed"].clone()
        if "patch_embed.proj.bias" not in target:
            positions[:, -(net.config.grid_size**2) :] += found.pop("patch_embed.proj.bias")
        if positions.shape[1] == target["pos_embed"].shape[1] + 1:
            found["cls_token"] = found["cls_token"] + positions[:, :1]
            positions = positions[:, 1:]
        found["pos_embed"] = positions
    for name in found.keys() - target.keys():  # timm's has it by another name, or in parts
        value, parts = found.pop(name), {}
        if name.endswith("qkv.bias"):  # that of keys does nothing
            q, _, v = value.chunk(3)
            parts = {
                name.replace("qkv.bias", f"{part}_bias"): x for part, x in (("q", q), ("v", v))
            }
            if not (parts.keys() <= target.keys() or q.any() or v.any()):
                parts = {}
        elif ".mlp.fc1." in name:
            parts = dict(
                zip((name.replace("fc1", f"fc1_{x}") for x in "gx"), value.chunk(2), strict=True)
            )
        else:  # timm's norm comes before the pooling, unless it takes the mean
            other = re.sub(r"ls([12])\.gamma", r"gamma_\1", re.sub("^fc_norm", "norm", name))
            parts = {other: value}
        found |= parts
    ours, twin = copy.deepcopy(net).eval(), copy.deepcopy(theirs).eval()
    try:
        twin.load_state_dict(found)
    except RuntimeError as error:  # it names keys and shapes
        raise ValueError(f"timm's is another ViT (img_size, num_classes?): {error}") from None
    noise = torch.randn(1, net.config.channels, *[net.config.image_size] * 2)
    noise = noise.to(net.fc_norm.weight)
    before, after = ours(noise), twin(ours.normalise(noise))  # timm's data pipeline normalises
    limit = 1e-4 * (1 + before.abs().max().item())
    if before.shape != after.shape or not torch.allclose(before, after, rtol=0.0, atol=limit):
        raise ValueError("timm's outputs on noise differ: other heads, activation or global_pool?")
    return found
