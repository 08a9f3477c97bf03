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
    for name in list(found):
        other = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        other = other.replace("relative.table", "relative_position_bias_table")
        if name not in target:  # timm's norm comes before the pooling, unless it takes the mean
            other = re.sub("^fc_norm", "norm", other)
        if other in target:
            found[other] = found.pop(name)
        if name.endswith("qkv.bias") and name not in target:  # that of keys does nothing
            q, _, v = found.pop(name).chunk(3)
            q_name, v_name = (name.replace("qkv.bias", f"{part}_bias") for part in "qv")
            if {q_name, v_name} <= target.keys() or q.any() or v.any():
                found |= {q_name: q, v_name: v}
        gates = [name.replace("mlp.fc1", f"mlp.fc1_{part}") for part in "gx"]
        if gates[0] != name and gates[0] in target:
            found |= zip(gates, found.pop(name).chunk(2), strict=True)
    found |= {name: value for name, value in target.items() if name.endswith("index")}
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
