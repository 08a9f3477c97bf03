"""Files of others, in our names: renamed tensors, and biases or positions that are missing zeros.

timm's names are ours, so most of this is about the files that the authors of a family publish. What
changes the computation stays, as a field of teachers.vit.Config.
"""

import math
import re
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from common.checkpoints import Checkpoint
from teachers.vit import Config
from teachers.zoo import PublicViT

PATCHES = ("patch_embed.proj.weight", "conv_proj.weight", "conv1.weight")  # torchvision's, CLIP's
DROPPED = re.compile(  # pre-training's, and heads that read other tokens than ours does
    r"decoder|mask_token|(encoder\.)?(norm|ln)\.|ln_post|proj$|attn_pool|lm_head|cls_pt_layers|"
    r"projectors|local_cls_norm|rope_embed|head_dist|.*(relative_position_index|rope\.|num_batches)"
)
OTHER_NETS = re.compile(
    r"(module\.)?(momentum_encoder|predictor|base_encoder\.head|head\.mlp|head\.last_layer)"
)
RENAMED = {
    r"^(module\.|backbone\.|base_encoder\.|visual\.)+": "",
    # torchvision, CLIP
    r"^class_token$|^class_embedding$": "cls_token",
    r"^encoder\.pos_embedding$|^positional_embedding$": "pos_embed",
    r"^conv_proj\.|^conv1\.": "patch_embed.proj.",
    r"^encoder\.layers\.encoder_layer_|^transformer\.resblocks\.": "blocks.",
    r"\.(self_attention|attn)\.in_proj_": ".attn.qkv.",
    r"\.(self_attention|attn)\.out_proj\.": ".attn.proj.",
    r"\.ln_([12])\.": r".norm\1.",
    r"\.mlp\.(0|linear_1|c_fc|w12)\.": ".mlp.fc1.",
    r"\.mlp\.(3|linear_2|c_proj|w3)\.": ".mlp.fc2.",
    r"\.mlp\.w1\.": ".mlp.fc1_g.",
    r"\.mlp\.w2\.": ".mlp.fc1_x.",
    r"^ln_pre\.": "norm_pre.",
    # families
    r"^blocks\.\d+\.(\d+)\.": r"blocks.\1.",  # DINOv2's code may keep them in chunks
    r"^(register_tokens|storage_tokens)$": "reg_token",
    r"\.gamma_([12])$": r".ls\1.gamma",
    r"relative_position_bias_table$": "relative.table",
}


def parse_foreign(found: Any, source: str, model: PublicViT | None, size=None) -> Checkpoint:
    """The contents of a file by others: of a public ViT, or of a plain one of a size of vit.py.

    ValueError if it is no ViT, another than `model`, or does not say what its shapes do not tell.
    """
    about = found if isinstance(found, dict) else {}
    wrappers = ("model", "state_dict", "module", "teacher")
    weights = next((about[key] for key in wrappers if isinstance(about.get(key), dict)), about)
    if not any(str(name).endswith(PATCHES) for name in weights):
        raise ValueError(f"{source} holds no ViT: nothing in it embeds patches")
    try:
        weights = rename(weights)
        architecture = asdict(describe(weights, model, size))
    except KeyError as error:
        raise ValueError(f"{source} is no ViT we know: {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if not model:
        return Checkpoint(source, weights, architecture)
    family = model.family
    known = dict(normalization=family.normalization, method=family.title, resize=family.resize)
    return Checkpoint(source, weights, architecture, **known)


def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ViT's file by our names, with zeros for biases that no block has.

    ValueError if two of them have the same name then.
    """
    found: dict[str, Tensor] = {}
    images_alone = any(name.startswith("visual.") for name in weights)  # CLIP reads text as well
    for theirs, value in weights.items():
        name = theirs
        if OTHER_NETS.match(name) or (images_alone and not name.startswith("visual.")):
            continue
        for pattern, ours in RENAMED.items():
            name = re.sub(pattern, ours, name)
        if name in found:
            raise ValueError(f"two of its tensors are {name}, one of them {theirs}")
        if not DROPPED.match(name):
            found[name] = value
    if "fc_norm.weight" not in found:  # its head read the class token, or pooled in its own way
        found = {k: v for k, v in found.items() if not k.startswith(("head.", "heads."))}
    shared = found.pop("rel_pos_bias.relative.table", None)
    biased = any(name.endswith(("qkv.bias", "q_bias")) for name in found)
    for i in range(count_blocks(found)):
        rename_in_block(found, f"blocks.{i}.", shared, biased)
    if "cls_token" in found:
        found["cls_token"] = found["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in found:
        positions = found["pos_embed"].reshape(1, -1, found["pos_embed"].shape[-1])
        count = positions.shape[1]
        if "cls_token" in found and math.isqrt(count) ** 2 == count:  # none for the class token
            positions = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
        found["pos_embed"] = positions
    if "norm_pre.weight" in found:  # CLIP has no bias of patches
        patches = found["patch_embed.proj.weight"]
        found.setdefault("patch_embed.proj.bias", patches.new_zeros(len(patches)))
    return found


def rename_in_block(found: dict, block: str, shared: Tensor | None, biased: bool) -> None:
    """Changes the tensors of one block, in place. `biased`: some block has a bias of q, k, v."""
    qkv, mlp = f"{block}attn.qkv.", f"{block}mlp.fc1"
    q, v = (f"{block}attn.{part}_bias" for part in "qv")
    if q in found and v in found:  # the key's is 0
        q, v = found.pop(q), found.pop(v)
        found[f"{qkv}bias"] = torch.cat([q, torch.zeros_like(q), v])
    elif not biased and f"{qkv}weight" in found:
        found[f"{qkv}bias"] = found[f"{qkv}weight"].new_zeros(len(found[f"{qkv}weight"]))
    mask = found.pop(f"{qkv}bias_mask", None)
    if mask is not None and f"{qkv}bias" in found:
        bias = found[f"{qkv}bias"]
        found[f"{qkv}bias"] = torch.where(mask == 1, bias, torch.zeros_like(bias))
    for part in ("weight", "bias"):
        gate, value = (found.pop(f"{mlp}_{which}.{part}", None) for which in "gx")
        if gate is not None and value is not None:
            found[f"{mlp}.{part}"] = torch.cat([gate, value])
    if shared is not None:
        found[f"{block}attn.relative.table"] = shared


def count_blocks(weights: dict[str, Tensor]) -> int:
    return 1 + max((int(k.split(".")[1]) for k in weights if k.startswith("blocks.")), default=-1)


def describe(weights: dict[str, Tensor], model: PublicViT | None, size=None) -> Config:
    """The kind of ViT, from tensors of our names. Shapes tell most, the family the rest."""
    dim, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    (gates, _), (_, hidden) = (weights[f"blocks.0.mlp.fc{i}.weight"].shape for i in "12")
    found: dict[str, Any] = dict(
        patch=patch, channels=channels, dim=dim, depth=count_blocks(weights), mlp=hidden / dim,
        classes=len(weights.get("head.weight", ())), class_token="cls_token" in weights,
        registers=weights["reg_token"].shape[-2] if "reg_token" in weights else 0,
        activation="gelu" if gates == hidden else "swiglu",
    )  # fmt: skip
    if "pos_embed" in weights:
        patches = weights["pos_embed"].shape[1] - found["class_token"]
        found["image_size"] = math.isqrt(patches) * patch
    if not model:
        if not size or size[0] != dim:
            raise ValueError(
                "it does not say how many attention heads it has, and the shapes do not tell (384 "
                f"wide: 6 or 12). Write SIZE=FILE with a size of vit.py that is {dim} wide, such "
                "as small=FILE, or NAME=FILE for a public ViT (python -m teachers lists them)"
            )
        return Config(**{"image_size": 0} | found, heads=size[2])
    names = ("dim", "depth", "patch")
    if odd := [name for name in names if found[name] != getattr(model, name)]:
        theirs = ", ".join(f"{name} {found[name]}, not {getattr(model, name)}" for name in odd)
        raise ValueError(f"it is not {model.name}: {theirs}")
    usual = dict(image_size=model.image_size, heads=model.heads)
    return Config(**usual | found | model.family.overrides)
