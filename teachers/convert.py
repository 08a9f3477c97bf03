"""Files of others, in our names (which are timm's), and as what kind of ViT."""

import re
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoints import Checkpoint
from common.launch import print0
from teachers.classes import IMAGENET
from teachers.zoo import ALL_SIZES, PublicViT, recognise

DROPPED = re.compile(  # pre-training's, and a head that pools by attention
    r"decoder|mask_token|attn_pool|projectors|local_cls_norm|rope_embed|"
    r"head_dist|momentum_encoder|predictor|.*(rope\.|num_batches)|n_averaged"
)
RENAMED = {
    r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.": "",
    r"^((module|model|net|backbone|base_encoder|encoder)\.)+": "",
    r"\.mlp\.w12\.": ".mlp.fc1.",
    r"\.mlp\.w3\.": ".mlp.fc2.",
    r"\.mlp\.w1\.": ".mlp.fc1_g.",
    r"\.mlp\.w2\.": ".mlp.fc1_x.",
    r"^blocks\.\d+\.(\d+)\.": r"blocks.\1.",  # DINOv2's code may keep them in chunks
    r"^(register_tokens|storage_tokens)$": "reg_token",
    r"\.gamma_([12])$": r".ls\1.gamma",
}


def parse_foreign(found: dict, source: str, place: str, model: PublicViT | None) -> Checkpoint:
    """The contents of a file by others: of a public ViT, or of a plain one with a known size."""
    wrappers = ("model", "state_dict", "model_state_dict", "module", "teacher")
    taken = next((key for key in wrappers if isinstance(found.get(key), dict)), "")
    theirs = found[taken] if taken else found
    large = [k for k, v in found.items() if isinstance(v, dict) and 2 * len(v) > len(theirs)]
    if taken and len(large) > 1:
        print0(f"note: {source} holds {' and '.join(large)}: {taken} is taken")
    try:
        model = check_name(theirs, place, model)
        weights = rename(theirs)
        architecture = describe(weights, model)
    except (KeyError, TypeError):
        remedy = "take timm's file of the same ViT, or its authors'"
        raise ValueError(f"{source} holds no ViT we know ({[*theirs][:3]}): {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    family = model and model.family
    if not family:  # its pixels are unknown
        return Checkpoint(source, weights, architecture)
    if "no commercial use" in family.licence:
        print0(f"note: the licence of {model.name} is {family.licence}")
    architecture |= zip(("mean", "std"), family.normalization, strict=True)
    classes = IMAGENET if architecture["classes"] == len(IMAGENET) else None
    return Checkpoint(source, weights, architecture, classes, family.title, resize=family.resize)


def check_name(theirs: dict, place: str, model: PublicViT | None) -> PublicViT | None:
    """The model, or else the one whose name the file has. ValueError if these contradict."""
    told = recognise(place)
    if told and model and (told.heads != model.heads or model.family not in (None, told.family)):
        raise ValueError(f"by the name of its file it is {told.name}: call it so, or rename it")
    if model and model.heads != 12 and any("base_encoder." in name for name in theirs):
        raise ValueError("its tensors are MoCo v3's, whose ViTs have 12 heads: vit-s-300ep=FILE")
    if "rope." in str([*theirs]) and "rope" not in str(told or model):
        raise ValueError("it has a rope that we do not know: take timm's file of another ViT")
    return model if model and model.family else told or model


def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ViT's file by our names, with zeros for biases that no block has."""
    found: dict[str, Tensor] = {}
    for theirs, value in weights.items():
        name = theirs
        for pattern, ours in RENAMED.items():
            name = re.sub(pattern, ours, name)
        if name in found:
            raise ValueError(f"two of its tensors are {name}, one of them {theirs}")
        if isinstance(value, Tensor) and not DROPPED.match(name):
            found[name] = value
    one_norm = ("norm.weight" in found) != ("fc_norm.weight" in found)
    if not one_norm or "head.weight" not in found or "attn_pool" in str([*weights]):
        found = {k: v for k, v in found.items() if not k.startswith(("head.", "heads."))}
    biased = any(name.endswith(("qkv.bias", "q_bias")) for name in found)
    for name, value in list(found.items()):  # what is here one tensor, if it is in parts there
        v, x = name.replace("q_bias", "v_bias"), name.replace("fc1_g.", "fc1_x.")
        if name.endswith("q_bias") and v in found:  # the key's is 0
            parts = found.pop(name), torch.zeros_like(value), found.pop(v)
            found[name.replace("q_bias", "qkv.bias")] = torch.cat(parts)
        elif name.endswith("qkv.bias_mask"):
            bias = name.removesuffix("_mask")
            found[bias] = found[bias].where(found.pop(name) == 1, 0)
        elif name.endswith("qkv.weight") and not biased:
            found[name.replace("weight", "bias")] = value.new_zeros(len(value))
        elif x != name and x in found:
            found[name.replace("fc1_g.", "fc1.")] = torch.cat([found.pop(name), found.pop(x)])
    if "pos_embed" in found and "cls_token" in found:
        tokens = found["pos_embed"].shape[1]
        if isqrt(tokens) ** 2 == tokens:  # it has none for the class token
            found["pos_embed"] = F.pad(found["pos_embed"], (0, 0, 1, 0))
    if "norm_pre.weight" in found:  # CLIP has no bias of patches
        found.setdefault("patch_embed.proj.bias", torch.zeros_like(found["norm_pre.bias"]))
    return found


def describe(weights: dict[str, Tensor], model: PublicViT | None) -> dict[str, Any]:
    """The fields of a Config. Shapes of tensors tell most, the family the rest."""
    dim, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    (gates, _), (_, hidden) = (weights[f"blocks.0.mlp.fc{i}.weight"].shape for i in "12")
    blocks = [int(name.split(".")[1]) for name in weights if name.startswith("blocks.")]
    found: dict[str, Any] = dict(
        patch=patch, channels=channels, dim=dim, depth=1 + max(blocks), mlp=hidden / dim,
        classes=len(weights.get("head.weight", ())), class_token="cls_token" in weights,
        registers=weights["reg_token"].shape[-2] if "reg_token" in weights else 0,
    )  # fmt: skip
    found |= {} if gates == hidden else {"activation": "swiglu"}
    if "norm.weight" in weights and found["classes"]:
        found["pool"] = "token" if found["class_token"] else "norms"
    if "pos_embed" in weights:
        found["image_size"] = patch * isqrt(len(weights["pos_embed"][0]) - found["class_token"])
    if model and model.family:
        usual = dict(class_token=True, registers=0, heads=model.heads) | model.family.overrides
        named = usual | dict(dim=model.dim, depth=model.depth, patch=model.patch)
        odd = {k: v for k, v in found.items() if v != named.get(k, v) and k != "classes"}
        if odd:
            raise ValueError(f"it has {odd}, but {model.name} has { {k: named[k] for k in odd} }")
        return {"image_size": model.image_size} | found | usual
    if not model or model.dim != dim or gates != hidden:  # EVA-02's rope leaves no tensor
        plain = [k for k, size in ALL_SIZES.items() if size[0] == dim and gates == hidden]
        remedy = f"write NAME=FILE (python -m teachers){''.join(f', {k}=FILE' for k in plain)}"
        raise ValueError(f"its shapes do not tell how it attends (heads, rope): {remedy}")
    return {"image_size": 0} | found | {"heads": model.heads}
