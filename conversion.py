"""Files of others, in our names: what is only another name or a zero is made ours here.

timm's names are ours, so most of this is about the files that the authors of a family publish. What
changes the function stays, and becomes a field of vit.Config.
"""

import re

import torch
from torch import Tensor, nn
from torch.func import functional_call

from families import Member
from vit import ACTIVATIONS, Config, ViT

PATCHES = ("patch_embed.proj.weight", "conv_proj.weight", "conv1.weight")  # torchvision's, CLIP's
DROPPED = re.compile(  # pre-training's, and heads that read other tokens than ours does
    r"decoder|mask_token|(encoder\.)?(norm|ln)\.|ln_post|proj$|attn_pool|lm_head|cls_pt_layers|"
    r"projectors|local_cls_norm|rope_embed|head_dist|.*(relative_position_index|rope\.|num_batches)"
)
OTHER_NETS = re.compile(
    r"(module\.)?(momentum_encoder|predictor|base_encoder\.head|head\.mlp|head\.last_layer)"
)
SIGNS = {  # of what a plain ViT has not, in the words of families.Family.adds
    "registers": "reg_token",
    "LayerScale": "blocks.0.ls1.gamma",
    "relative positions": "blocks.0.attn.relative.table",
    "a norm before the blocks": "norm_pre.weight",
}
RENAMED = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^(module\.|backbone\.|base_encoder\.|visual\.)+", ""),
        # torchvision
        (r"^class_token$|^class_embedding$", "cls_token"),
        (r"^encoder\.pos_embedding$|^positional_embedding$", "pos_embed"),
        (r"^conv_proj\.|^conv1\.", "patch_embed.proj."),
        (r"^encoder\.layers\.encoder_layer_|^transformer\.resblocks\.", "blocks."),
        (r"\.(self_attention|attn)\.in_proj_", ".attn.qkv."),
        (r"\.(self_attention|attn)\.out_proj\.", ".attn.proj."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.mlp\.(0|linear_1|c_fc|w12)\.", ".mlp.fc1."),
        (r"\.mlp\.(3|linear_2|c_proj|w3)\.", ".mlp.fc2."),
        (r"\.mlp\.w1\.", ".mlp.fc1_g."),
        (r"\.mlp\.w2\.", ".mlp.fc1_x."),
        (r"^heads\.head\.", "head."),
        # families
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2's code may keep them in chunks
        (r"^ln_pre\.", "norm_pre."),
        (r"^(register_tokens|storage_tokens)$", "reg_token"),
        (r"\.gamma_([12])$", r".ls\1.gamma"),
        (r"relative_position_bias_table$", "relative.table"),
    )
]


def ours(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a ViT's file by our names, with zeros for biases that no block has.

    ValueError if two of them have one name of ours.
    """
    found, images_alone = {}, any(str(name).startswith("visual.") for name in weights)
    for theirs, value in weights.items():
        name = str(theirs)
        if OTHER_NETS.match(name) or (images_alone and not name.startswith("visual.")):
            continue
        for pattern, new in RENAMED:
            name = pattern.sub(new, name)
        if name in found:
            raise ValueError(f"two of its tensors are {name}, one of them {theirs}")
        if not DROPPED.match(name):
            found[name] = value
    if "fc_norm.weight" not in found:  # it read the class token, or pooled in its own way
        found = {k: v for k, v in found.items() if not k.startswith("head.")}
    shared = found.pop("rel_pos_bias.relative.table", None)
    biased = any(name.endswith(("qkv.bias", "q_bias")) for name in found)
    for i in range(depth_of(found)):
        absorb(found, f"blocks.{i}.", shared, biased)
    positions, cls = found.get("pos_embed"), found.get("cls_token")
    if positions is not None:
        positions = positions.reshape(1, -1, positions.shape[-1])
        if cls is not None and square(positions.shape[1]):  # the class token has no position
            positions = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
        found["pos_embed"] = positions
    if cls is not None:
        found["cls_token"] = cls.reshape(1, 1, -1)
    if "norm_pre.weight" in found:  # CLIP has no bias of patches
        patches = found["patch_embed.proj.weight"]
        found.setdefault("patch_embed.proj.bias", patches.new_zeros(len(patches)))
    return found


def absorb(found: dict[str, Tensor], block: str, shared: Tensor | None, biased: bool) -> None:
    """Makes the tensors of one block ours, in place. `biased`: some block has a bias of q, k, v."""
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


def image_size(weights: dict[str, Tensor]) -> int:
    """What it was trained at, told by the number of positions."""
    patches = weights["pos_embed"].shape[1] - ("cls_token" in weights)
    return round(patches**0.5) * weights["patch_embed.proj.weight"].shape[-1]


def depth_of(weights: dict[str, Tensor]) -> int:
    return 1 + max((int(k.split(".")[1]) for k in weights if k.startswith("blocks.")), default=-1)


def square(count: int) -> bool:
    return round(count**0.5) ** 2 == count


def describe(weights: dict[str, Tensor], member: Member | None, heads: int = 0) -> Config:
    """What kind of ViT tensors of our names are. The shapes tell most, the family the rest.

    ValueError if something is missing: of an unknown family, what no shape tells.
    """
    try:
        dim, channels, patch, _ = weights["patch_embed.proj.weight"].shape
        hidden, inner = len(weights["blocks.0.mlp.fc1.weight"]), weights["blocks.0.mlp.fc2.weight"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"it is no ViT of a kind we know: {error} is missing") from None
    gates = hidden // inner.shape[1]
    found = dict(
        patch=patch, channels=channels, dim=dim, depth=depth_of(weights), mlp=inner.shape[1] / dim,
        classes=len(weights.get("head.weight", ())), class_token="cls_token" in weights,
        registers=weights["reg_token"].shape[-2] if "reg_token" in weights else 0,
    )  # fmt: skip
    if gates == 2:
        found["activation"] = "swiglu"
    if not member:
        beyond = [what for what, sign in SIGNS.items() if sign in weights]
        beyond += ["SwiGLU"] * (gates == 2) + ["no positions"] * ("pos_embed" not in weights)
        if beyond:
            raise ValueError(
                f"it is no plain ViT ({', '.join(beyond)}) and does not say of which family: write "
                "NAME=FILE (python teachers.py lists the names)"
            )
        if not heads:
            raise ValueError(
                "it does not say how many attention heads it has, and sizes do not tell (width "
                "384 may have 6 or 12): say it with --teacher-heads (to compare or evaluate: "
                "--num-heads)"
            )
        return Config(image_size=image_size(weights), heads=heads, **found)
    if (dim, found["depth"]) != (member.dim, member.depth):
        raise ValueError(
            f"it is {dim} wide and {found['depth']} deep, but {member.name} is {member.dim} wide "
            f"and {member.depth} deep (python teachers.py lists all)"
        )
    if patch != member.patch:
        raise ValueError(
            f"{member.name} has patches of {member.patch} pixels, the file patches of {patch}"
        )
    if found["class_token"] == ("no class token" in member.family.adds):
        has = "has a class token" if found["class_token"] else "lacks the class token"
        raise ValueError(f"it is not {member.name}: the file {has}")
    for what, sign in SIGNS.items():
        if (sign in weights) != (what in member.family.adds):
            has = "the file has" if sign in weights else "the file lacks"
            raise ValueError(f"it is not {member.name}: {has} {what}")
    found = member.family.beyond | found
    size = image_size(weights) if "pos_embed" in weights else member.image_size
    return Config(image_size=size, heads=member.heads, **found)


def timms(model, theirs: nn.Module) -> dict[str, Tensor]:
    """The weights of a checkpoints.Model for a ViT of timm's, whose names and shapes decide.

    What timm's has no tensor for is moved to where it does the same. ValueError if it is another
    function: other heads, norms, activations or positions, another pooling, something learned that
    it has no place for; or the maps of a teacher, which a student of attention copy needs.

        net = timm.create_model(name, num_classes=10, global_pool="avg")
        net.load_state_dict(conversion.timms(checkpoints.open_model(path), net))
    """
    if model.teacher:
        raise ValueError(
            "a student of attention copy attends with its teacher's maps, which timm's nets cannot "
            "(one of attention distillation can be timm's)"
        )
    net = model.net
    target, found = theirs.state_dict(), dict(net.state_dict())
    check_alike(net, theirs)
    positions = found.get("pos_embed")
    if positions is not None and "patch_embed.proj.bias" not in target:
        patches = net.config.side**2
        found["pos_embed"] = positions.clone()
        found["pos_embed"][:, -patches:] += found.pop("patch_embed.proj.bias")
    if positions is not None and positions.shape[1] == target["pos_embed"].shape[1] + 1:
        found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
        found["pos_embed"] = found["pos_embed"][:, 1:]
    for name in list(found):
        other = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        other = other.replace("relative.table", "relative_position_bias_table")
        if other in target:
            found[other] = found.pop(name)
        if name.endswith("qkv.bias") and name not in target:  # that of keys does nothing
            q, _, v = found.pop(name).chunk(3)
            biases = {name.replace("qkv", "q"): q, name.replace("qkv", "v"): v}
            biases = {k.replace(".bias", "_bias"): bias for k, bias in biases.items()}
            if biases.keys() <= target.keys() or q.any() or v.any():
                found |= biases
        gates = [name.replace("mlp.fc1", f"mlp.fc1_{part}") for part in "gx"]
        if gates[0] != name and gates[0] in target:
            found |= zip(gates, found.pop(name).chunk(2), strict=True)
    buffers = {k: v for k, v in target.items() if k.endswith("index")}
    differ = found.keys() ^ (target.keys() - buffers.keys())
    differ |= {k for k in found.keys() & target.keys() if found[k].shape != target[k].shape}
    if differ:
        names = ", ".join(sorted(differ)[:4])
        raise ValueError(
            f"timm's is another ViT: {names} (are its img_size, num_classes and pooling those of "
            "the student?)"
        )
    check_equal(net, theirs, found | buffers)
    return found | buffers


@torch.no_grad()
def check_equal(net: ViT, theirs: nn.Module, weights: dict[str, Tensor]) -> None:
    """ValueError if with these weights timm's says something else of an image of noise."""
    config, trained = net.config, (net.training, theirs.training)
    shape = (1, config.channels, config.image_size, config.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    images = images.to(net.patch_embed.proj.weight)
    ours, found = net.eval()(images), functional_call(theirs.eval(), weights, images)
    for module, before in zip((net, theirs), trained, strict=True):
        module.train(before)
    gap = (found - ours).abs().max() if found.shape == ours.shape else torch.inf
    if not gap <= 1e-4 * (1 + ours.abs().max()):
        raise ValueError(
            f"timm's is another function: on an image of noise its outputs are {gap:.2g} off (has "
            "it the same positions, and global_pool='avg'?)"
        )


def check_alike(net: ViT, theirs: nn.Module) -> None:
    """ValueError if what no tensor tells differs in timm's."""
    block, x = theirs.blocks[0], torch.linspace(-4, 4, 64)
    told = {"heads": block.attn.num_heads, "eps": block.norm1.eps}
    own, name = {k: getattr(net.config, k) for k in told}, net.config.activation
    differ = [f"{k} {told[k]}, not {own[k]}" for k in told if told[k] != own[k]]
    act = getattr(block.mlp, "act", None)
    ours = nn.functional.silu if name == "swiglu" else ACTIVATIONS[name]
    if act is not None and not torch.allclose(act(x), ours(x), atol=1e-6):
        differ.append(f"another activation than {name}")
    if differ:
        raise ValueError(f"timm's is another function: {'; '.join(differ)}")
