"""Families of ViTs whose weights can be had: what each adds to a plain ViT, where its files are.

`python teachers.py` prints this; checkpoints.read takes these names. To add a family: a row below,
and, if its files name a tensor in a way of their own, a line in conversion.py.
"""

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

from torchvision import models

from augment import Normalization
from data import IMAGENET
from positions import PLAINLY, Resize
from vit import SIZES, Config

HALF = ([0.5] * 3, [0.5] * 3)
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
TIMM = "https://huggingface.co/timm/{}/resolve/main/model.safetensors"
FAIR = "https://dl.fbaipublicfiles.com/"
SIZES = SIZES | {
    "small/12": (384, 12, 12),  # MoCo v3's
    "medium": (512, 12, 8),
    "huge+": (1280, 32, 20),
    "giant": (1536, 40, 24),
    "2b": (2688, 24, 21),  # Web-DINO's and Web-MAE's
    "3b": (3072, 26, 24),
    "so400m": (1152, 27, 16),
}


@dataclass(frozen=True)
class Family:
    """What the shapes in a file do not tell.

    `members`: a line for each, "NAME SIZE PATCH IMAGE_SIZE [FILE]": NAME is timm's, whose file is
    taken, unless FILE, behind the URL `files`, says where. `beyond`: fields of vit.Config;
    `layer_scale` is what a new student begins with. `resize`: as the family's own code does it.
    """

    title: str
    adds: str  # to a plain ViT
    licence: str
    source: str
    members: str
    beyond: dict = field(default_factory=dict)
    normalization: Normalization = IMAGENET
    resize: Resize = PLAINLY
    files: str = ""
    note: str = ""  # what to say behind a member's name when it is read


FREE = "Apache 2.0"
NO_COMMERCE = "CC-BY-NC 4.0 (no commercial use)"
FAMILIES = (
    Family("MAE", "nothing", NO_COMMERCE, "github.com/facebookresearch/mae", """
        vit_base_patch16_224.mae base 16 224
        vit_large_patch16_224.mae large 16 224
        vit_huge_patch14_224.mae huge 14 224
        mae_pretrain_vit_base base 16 224 mae_pretrain_vit_base.pth#md5=8cad7c
        mae_pretrain_vit_large large 16 224 mae_pretrain_vit_large.pth#md5=b8b06e
        mae_pretrain_vit_huge huge 14 224 mae_pretrain_vit_huge.pth#md5=9bdbb0""",
        files=FAIR + "mae/pretrain/"),
    Family("Web-MAE", "nothing", NO_COMMERCE, "github.com/facebookresearch/webssl", """
        webssl_mae300m_full2b_224 large 16 224 webssl_mae300m_full2b_224.pth
        webssl_mae700m_full2b_224 huge 14 224 webssl_mae700m_full2b_224.pth
        webssl_mae1b_full2b_224 giant 14 224 webssl_mae1b_full2b_224.pth
        webssl_mae2b_full2b_224 2b 14 224 webssl_mae2b_full2b_224.pth
        webssl_mae3b_full2b_224 3b 14 224 webssl_mae3b_full2b_224.pth""",
        files=FAIR + "webssl/"),
    Family("Web-DINO", "LayerScale, SwiGLU", NO_COMMERCE, "github.com/facebookresearch/webssl", """
        webssl_dino300m_full2b_224 large 14 224 webssl_dino300m_full2b_224.pth
        webssl_dino1b_full2b_224 giant 14 224 webssl_dino1b_full2b_224.pth
        webssl_dino2b_full2b_224 2b 14 224 webssl_dino2b_full2b_224.pth
        webssl_dino3b_full2b_224 3b 14 224 webssl_dino3b_full2b_224.pth""",
        dict(layer_scale=1e-5), resize=Resize(offset=0.1), files=FAIR + "webssl/"),
    Family("DINO", "nothing", FREE, "github.com/facebookresearch/dino", """
        vit_small_patch16_224.dino small 16 224
        vit_small_patch8_224.dino small 8 224
        vit_base_patch16_224.dino base 16 224
        vit_base_patch8_224.dino base 8 224
        dino_deitsmall16_pretrain small 16 224 \
        dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth
        dino_deitsmall8_pretrain small 8 224 dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth
        dino_vitbase16_pretrain base 16 224 dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth
        dino_vitbase8_pretrain base 8 224 dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth""",
        resize=Resize(offset=0.1), files=FAIR + "dino/"),
    Family("iBOT", "nothing", FREE, "github.com/bytedance/ibot", "\n".join(
        f"ibot_vit{letter}_16 {size} 16 224 vit{letter}_16/checkpoint_teacher.pth"
        for letter, size in (("s", "small"), ("b", "base"), ("l", "large"))),
        resize=Resize(offset=0.1),
        files="https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/"),
    Family("MoCo v3", "nothing", NO_COMMERCE, "github.com/facebookresearch/moco-v3", """
        vit-s-300ep small/12 16 224 vit-s-300ep/vit-s-300ep.pth.tar
        vit-b-300ep base 16 224 vit-b-300ep/vit-b-300ep.pth.tar""",
        files=FAIR + "moco-v3/"),
    Family("DeiT", "nothing", FREE, "github.com/facebookresearch/deit", """
        deit_tiny_patch16_224.fb_in1k tiny 16 224
        deit_small_patch16_224.fb_in1k small 16 224
        deit_base_patch16_224.fb_in1k base 16 224
        deit_base_patch16_384.fb_in1k base 16 384
        deit_tiny_patch16_224-a1311bcf tiny 16 224 deit_tiny_patch16_224-a1311bcf.pth
        deit_small_patch16_224-cd65a155 small 16 224 deit_small_patch16_224-cd65a155.pth
        deit_base_patch16_224-b5f2ef4d base 16 224 deit_base_patch16_224-b5f2ef4d.pth""",
        files=FAIR + "deit/"),
    Family("DeiT III", "LayerScale", FREE, "github.com/facebookresearch/deit", """
        deit3_small_patch16_224.fb_in1k small 16 224
        deit3_medium_patch16_224.fb_in1k medium 16 224
        deit3_base_patch16_224.fb_in1k base 16 224
        deit3_large_patch16_224.fb_in1k large 16 224
        deit3_huge_patch14_224.fb_in1k huge 14 224
        deit3_small_patch16_224.fb_in22k_ft_in1k small 16 224
        deit3_base_patch16_224.fb_in22k_ft_in1k base 16 224
        deit3_large_patch16_224.fb_in22k_ft_in1k large 16 224
        deit_3_small_224_1k small 16 224 deit_3_small_224_1k.pth
        deit_3_base_224_1k base 16 224 deit_3_base_224_1k.pth
        deit_3_large_224_1k large 16 224 deit_3_large_224_1k.pth""",
        dict(layer_scale=1e-6), files=FAIR + "deit/"),
    Family("AugReg", "nothing", FREE, "github.com/google-research/vision_transformer", """
        vit_tiny_patch16_224.augreg_in21k tiny 16 224
        vit_small_patch16_224.augreg_in21k small 16 224
        vit_base_patch16_224.augreg_in21k base 16 224
        vit_large_patch16_224.augreg_in21k large 16 224
        vit_tiny_patch16_224.augreg_in21k_ft_in1k tiny 16 224
        vit_small_patch16_224.augreg_in1k small 16 224
        vit_small_patch16_224.augreg_in21k_ft_in1k small 16 224
        vit_base_patch16_224.augreg_in1k base 16 224
        vit_base_patch16_224.augreg_in21k_ft_in1k base 16 224
        vit_large_patch16_224.augreg_in21k_ft_in1k large 16 224""", normalization=HALF,
        resize=Resize(mode="bilinear", align_corners=True)),
    Family("DINOv2", "LayerScale (SwiGLU in giant)",
        FREE, "github.com/facebookresearch/dinov2", "\n".join(
        f"vit_{size}_patch14_dinov2.lvd142m {size} 14 518\n"
        f"dinov2_vit{size[0]}14_pretrain {size} 14 518 "
        f"dinov2_vit{size[0]}14/dinov2_vit{size[0]}14_pretrain.pth"
        for size in ("small", "base", "large", "giant")), dict(layer_scale=1e-5),
        resize=Resize(offset=0.1), files=FAIR + "dinov2/"),
    Family("DINOv2 with registers", "LayerScale, registers (SwiGLU in giant)",
        FREE, "github.com/facebookresearch/dinov2", "\n".join(
        f"vit_{size}_patch14_reg4_dinov2.lvd142m {size} 14 518\n"
        f"dinov2_vit{size[0]}14_reg4_pretrain {size} 14 518 "
        f"dinov2_vit{size[0]}14/dinov2_vit{size[0]}14_reg4_pretrain.pth"
        for size in ("small", "base", "large", "giant")), dict(layer_scale=1e-5),
        resize=Resize(antialias=True), files=FAIR + "dinov2/"),
    Family("DINOv3", "LayerScale, registers, rope (SwiGLU in plus)",
        "DINOv3 License (the authors' own files are gated)",
        "github.com/facebookresearch/dinov3", """
        vit_small_patch16_dinov3.lvd1689m small 16 256
        vit_small_plus_patch16_dinov3.lvd1689m small 16 256
        vit_base_patch16_dinov3.lvd1689m base 16 256
        vit_large_patch16_dinov3.lvd1689m large 16 256
        vit_huge_plus_patch16_dinov3.lvd1689m huge+ 16 256
        vit_small_patch16_dinov3_qkvb.lvd1689m small 16 256
        vit_base_patch16_dinov3_qkvb.lvd1689m base 16 256
        vit_large_patch16_dinov3_qkvb.lvd1689m large 16 256""",
        dict(positions="rope", layer_scale=1e-5, eps=1e-5)),
    Family("EUPE", "LayerScale, registers, rope",
        "FAIR Noncommercial Research License (no commercial use)",
        "github.com/facebookresearch/EUPE", """
        vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m tiny 16 256
        vit_small_patch16_dinov3_qkvb.eupe_lvd1689m small 16 256
        vit_base_patch16_dinov3_qkvb.eupe_lvd1689m base 16 256""",
        dict(positions="rope", layer_scale=1e-5, eps=1e-5)),
    Family("CLIP (OpenAI's)", "a norm before the blocks, QuickGELU",
        "MIT", "github.com/openai/CLIP", "\n".join(
        f"vit_{kind}_clip_quickgelu_{pixels}.openai {size} {patch} {pixels} "
        + f"vit_{kind}_clip_{pixels}.openai/resolve/main/model.safetensors"
        for kind, size, patch, pixels in (
            ("base_patch32", "base", 32, 224), ("base_patch16", "base", 16, 224),
            ("large_patch14", "large", 14, 224), ("large_patch14", "large", 14, 336))),
        dict(norm_pre=True, eps=1e-5, activation="quick_gelu"), CLIP, resize=Resize(antialias=True),
        files="https://huggingface.co/timm/"),
    Family("CLIP (OpenAI's, with GELU, as timm reads these names)", "a norm before the blocks",
        "MIT", "github.com/openai/CLIP", """
        vit_base_patch32_clip_224.openai base 32 224
        vit_base_patch16_clip_224.openai base 16 224
        vit_large_patch14_clip_224.openai large 14 224""",
        dict(norm_pre=True, eps=1e-5), CLIP, resize=Resize(antialias=True),
        note="is read with GELU, as timm does; it was trained with QuickGELU (clip_quickgelu_224)"),
    Family("CLIP (LAION's)", "a norm before the blocks",
        "MIT", "github.com/mlfoundations/open_clip", """
        vit_base_patch32_clip_224.laion2b base 32 224
        vit_base_patch16_clip_224.laion2b base 16 224
        vit_huge_patch14_clip_224.laion2b huge 14 224""",
        dict(norm_pre=True, eps=1e-5), CLIP, resize=Resize(antialias=True)),
    *(Family(f"BEiT v2, {size}", "LayerScale, relative positions", "MIT",
        "github.com/microsoft/unilm/tree/master/beit2", f"""
        beitv2_{size}_patch16_224.in1k_ft_in22k {size} 16 224
        beitv2_{size}_patch16_224.in1k_ft_in1k {size} 16 224
        beitv2_{size}_patch16_224.in1k_ft_in22k_in1k {size} 16 224
        beitv2_{size}_patch16_224_pt1k {size} 16 224 beitv2_{size}_patch16_224_pt1k.pth""",
        dict(positions="relative", layer_scale=begin),
        files="https://github.com/addf400/files/releases/download/BEiT-v2/")
      for size, begin in (("base", 0.1), ("large", 1e-5))),
    Family("SigLIP 2", "no class token", FREE, "github.com/google-research/big_vision", """
        vit_base_patch16_siglip_224.v2_webli base 16 224
        vit_base_patch16_siglip_256.v2_webli base 16 256
        vit_base_patch16_siglip_384.v2_webli base 16 384
        vit_large_patch16_siglip_256.v2_webli large 16 256
        vit_large_patch16_siglip_384.v2_webli large 16 384
        vit_so400m_patch14_siglip_224.v2_webli so400m 14 224""", normalization=HALF,
        resize=Resize(mode="bilinear", align_corners=True)),
    Family("torchvision's", "nothing",
        "BSD 3-Clause (that of its SWAG weights is CC-BY-NC 4.0)", "pytorch.org/vision", """
        torchvision:vit_b_16 base 16 224
        torchvision:vit_b_32 base 32 224
        torchvision:vit_l_16 large 16 224
        torchvision:vit_l_32 large 32 224""", resize=Resize(align_corners=True)),
)  # fmt: skip


class Member(NamedTuple):
    """One set of weights."""

    name: str
    family: Family
    dim: int
    depth: int
    heads: int
    patch: int
    image_size: int  # pixels a side, that it was trained at
    url: str  # (torchvision's: "")


def members(family: Family) -> list[Member]:
    found = []
    for line in family.members.split("\n"):
        if line.strip():
            name, size, patch, pixels, *file = line.split()
            url = family.files + file[0] if file else TIMM.format(name)
            url = "" if name.startswith("torchvision:") else url  # torchvision knows it
            found.append(Member(name, family, *SIZES[size], int(patch), int(pixels), url))
    return found


MEMBERS = {member.name: member for family in FAMILIES for member in members(family)}


def size(model: str) -> tuple[int, int, int]:
    """Width, depth and heads of --model: a size's name, or a member's. ValueError for others."""
    if model in SIZES:
        return SIZES[model]
    if member := named(model):
        return member.dim, member.depth, member.heads
    raise ValueError(
        f"no ViT is called '{model}': choose one of {', '.join(SIZES)}, or a name that python "
        "teachers.py lists"
    )


def sizes(settings, dataset) -> Config:
    """The ViT that --model, --patch and --components ask for, for a data.Data."""
    dim, depth, heads = size(settings.model)
    plain = Config(
        image_size=dataset.image_size,
        patch=settings.patch,
        channels=dataset.channels,
        classes=len(dataset.classes),
        dim=dim,
        depth=depth,
        heads=heads,
    )
    return replace(plain, **components(settings.components))


COMPONENTS = (  # fields of vit.Config that families change
    "class_token", "registers", "positions", "rope_base", "norm_pre", "layer_scale", "activation",
    "eps", "mlp",
)  # fmt: skip


def components(text: str) -> dict:
    """--components: fields of vit.Config, from "registers=4,norm_pre=1,positions=rope".

    ValueError if there is no such component, or no such value.
    """
    kinds, found = {field.name: field.type for field in fields(Config)}, {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in COMPONENTS:
            raise ValueError(f"--components {name}: choose from {', '.join(COMPONENTS)}")
        if name in found:
            raise ValueError(f"--components: {name} is named twice")
        try:
            found[name] = kinds[name](int(value) if kinds[name] is bool else value)
        except ValueError:
            raise ValueError(
                f"--components {part}: not of type {kinds[name].__name__} (write e.g. {name}=1)"
            ) from None
    return found


def named(name: str) -> Member | None:
    """The member of this name; what stands behind its dot may be left out if there is but one."""
    alike = [member for full, member in MEMBERS.items() if full.split(".")[0] == name]
    return MEMBERS.get(name) or (alike[0] if len(alike) == 1 else None)


def locate(source: str) -> tuple[Member | None, str]:
    """What NAME, NAME=PLACE, or a path or URL names: a member if it is one, and where the file is.

    A file is known by its name as its authors have it, or timm's model.safetensors by its folder.
    ValueError for NAME=PLACE of an unknown name.
    """
    if not Path(source).is_file():
        if member := named(source):
            return member, place(member)
        name, _, file = source.partition("=")
        if file and "/" not in name:
            if member := named(name):
                return member, file
            raise ValueError(f"{source}: no family has a '{name}' (python teachers.py lists them)")
    url, path = address(source), Path(address(source))
    many = path.name in ("model.safetensors", "checkpoint_teacher.pth")  # the name of many files
    for how in (
        lambda member: path.stem == member.name or (many and member.name in path.parts),
        lambda member: url == address(place(member)),
        lambda member: not many and path.name == Path(address(place(member))).name,
    ):
        if member := next(filter(how, MEMBERS.values()), None):
            return member, source
    return None, source


def address(url: str) -> str:
    """Without what asks for it in a certain way, or says its hash."""
    return re.split("[?#]", url)[0]


def place(member: Member) -> str:
    """The URL of its file."""
    return member.url or models.get_model_weights(member.name.split(":")[1]).DEFAULT.url


def notes(member: Member | None) -> list[str]:
    """What is to be known by those who use it."""
    if not member:
        return []
    licence = f"the licence of {member.name} is {member.family.licence}"
    said = [licence] if "no commercial use" in licence else []
    return said + [f"{member.name} {member.family.note}"] * bool(member.family.note)
