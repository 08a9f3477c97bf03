"""Our ViTs as timm's.

>>> net = timm.create_model(name, num_classes=10, global_pool="avg")
>>> net.load_state_dict(to_timm(load.open_model(path), net))
"""

import copy

import torch
from torch import Tensor, nn

PARTS = {  # in a name of timm's: what it is here, and which part of how many
    "q_bias": ("qkv.bias", 0, 3), "v_bias": ("qkv.bias", 2, 3),  # that of keys does nothing
    "fc1_g.": ("fc1.", 0, 2), "fc1_x.": ("fc1.", 1, 2),
    "gamma_1": ("ls1.gamma", 0, 1), "gamma_2": ("ls2.gamma", 0, 1),
    "norm.": ("fc_norm.", 0, 1),  # before the pooling, unless it takes the mean
}  # fmt: skip


@torch.no_grad()
def to_timm(model, theirs: nn.Module) -> dict[str, Tensor]:
    """The weights of a load.Model for a ViT of timm's, whose names and shapes decide.

    What timm's has no tensor for is moved to where it does the same. ValueError if timm's computes
    something else, or if the model needs its teacher's maps.
    """
    if model.teacher:
        raise ValueError("a student of attention copy needs its teacher's maps: timm's take none")
    net, target, found = model.net, theirs.state_dict(), model.net.state_dict()
    if "pos_embed" in found:
        positions = found["pos_embed"].clone()
        if "patch_embed.proj.bias" not in target:
            positions[:, -(net.config.grid_size**2) :] += found.pop("patch_embed.proj.bias")
        if positions.shape[1] == target["pos_embed"].shape[1] + 1:
            found["cls_token"] = found["cls_token"] + positions[:, :1]
            positions = positions[:, 1:]
        found["pos_embed"] = positions
    left = {name: found.pop(name) for name in found.keys() - target.keys()}
    wholes = set()
    for name in target.keys() - found.keys():
        for part, (own, i, count) in PARTS.items():
            if part in name and (whole := name.replace(part, own)) in left:
                found[name] = left[whole].chunk(count)[i]
                wholes.add(whole)
    found |= {name: x for name, x in left.items() if name not in wholes and x.any()}  # refused
    ours, twin = copy.deepcopy(net).eval(), copy.deepcopy(theirs).eval()
    try:
        twin.load_state_dict(found)
    except RuntimeError as error:  # it names keys and shapes
        raise ValueError(f"timm's is another ViT (img_size, num_classes?): {error}") from None
    noise = torch.randn(1, net.config.channels, *[net.config.image_size] * 2).to(net.mean)
    before, after = ours(noise), twin(ours.normalise(noise))  # timm's data pipeline normalises
    limit = 1e-4 * (1 + before.abs().max().item())
    if before.shape != after.shape or not torch.allclose(before, after, rtol=0.0, atol=limit):
        raise ValueError("timm's outputs on noise differ: other heads, activation or global_pool?")
    return found
