"""Public ViTs by name: what each family adds to a plain one, and where its files are."""

import difflib
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from recipes import NORMALIZATIONS, SIZES
from teachers.positions import Resize

IMAGENET, HALF, CLIP = (NORMALIZATIONS[name] for name in ("imagenet", "half", "clip"))
TIMM = "https://huggingface.co/timm/{}/resolve/main/model.safetensors"
FAIR = "https://dl.fbaipublicfiles.com/"
APACHE = "Apache 2.0"
NO_COMMERCE = "CC-BY-NC 4.0 (no commercial use)"
ALL_SIZES = SIZES | {
    "small/12": (384, 12, 12), "medium": (512, 12, 8), "huge+": (1280, 32, 20),
    "giant": (1536, 40, 24), "2b": (2688, 24, 21), "3b": (3072, 26, 24), "so400m": (1152, 27, 16),
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What the shapes in a file do not tell. To add a model: a row, and its tensors in convert.py.

    `models`: rows "SIZES PATCHES IMAGE_SIZES NAME [FILE]", for all combinations. {} is the size, or
    WORD where it is written SIZE=WORD, {p} the patch and {i} the image size. Without FILE, NAME is
    timm's and so is the file. With it, the file is at `files`, whose {} is FILE.
    """

    title: str
    description: str  # what it adds to a plain ViT
    licence: str
    models: str
    overrides: dict = field(default_factory=dict)  # of the defaults of teachers.vit.Config
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET  # mean and std
    resize: Resize = field(default_factory=Resize)  # as the family's own code does it
    files: str = ""


FAMILIES = (
    Family("MAE", "nothing", NO_COMMERCE, """
    base,large 16 224 vit_{}_patch16_224.mae
    huge       14 224 vit_{}_patch14_224.mae
    base,large 16 224 mae_pretrain_vit_{} {name}.pth
    huge       14 224 mae_pretrain_vit_{} {name}.pth""", files=FAIR + "mae/pretrain/{}"),
    Family("Web-MAE", "nothing", NO_COMMERCE, """
    large=300m               16 224 webssl_mae{}_full2b_224 {name}.pth
    huge=700m,giant=1b,2b,3b 14 224 webssl_mae{}_full2b_224 {name}.pth""",
        files=FAIR + "webssl/{}"),
    Family("Web-DINO", "LayerScale, SwiGLU", NO_COMMERCE, """
    large=300m,giant=1b,2b,3b 14 224 webssl_dino{}_full2b_224 {name}.pth""",
        dict(layer_scale=1e-5), resize=Resize(offset=0.1), files=FAIR + "webssl/{}"),
    Family("DINO", "nothing", APACHE, """
    small,base 16,8 224 vit_{}_patch{p}_224.dino""", resize=Resize(offset=0.1)),
    Family("iBOT", "nothing", APACHE, """
    small=s,base=b,large=l 16 224 ibot_vit{}_16 vit{}_16/checkpoint_teacher.pth""",
        resize=Resize(offset=0.1),
        files="https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/{}"),
    Family("MoCo v3", "nothing", NO_COMMERCE, """
    small/12=s,base=b 16 224 vit-{}-300ep {name}/{name}.pth.tar""", files=FAIR + "moco-v3/{}"),
    Family("DeiT", "nothing", APACHE, """
    tiny,small,base 16 224 deit_{}_patch16_224.fb_in1k
    base            16 384 deit_{}_patch16_384.fb_in1k"""),
    Family("DeiT III", "LayerScale", APACHE, """
    small,medium,base,large 16 224 deit3_{}_patch16_224.fb_in1k
    huge                    14 224 deit3_{}_patch14_224.fb_in1k
    small,base,large        16 224 deit3_{}_patch16_224.fb_in22k_ft_in1k""",
        dict(layer_scale=1e-6)),
    Family("AugReg", "nothing", APACHE, """
    tiny,small,base,large 16 224 vit_{}_patch16_224.augreg_in21k
    tiny,small,base,large 16 224 vit_{}_patch16_224.augreg_in21k_ft_in1k
    small,base            16 224 vit_{}_patch16_224.augreg_in1k""",
        normalization=HALF, resize=Resize(mode="bilinear")),
    Family("DINOv2", "LayerScale (SwiGLU in giant)", APACHE, """
    small,base,large,giant 14 518 vit_{}_patch14_dinov2.lvd142m""",
        dict(layer_scale=1e-5), resize=Resize(offset=0.1)),
    Family("DINOv2 with registers", "LayerScale, registers (SwiGLU in giant)", APACHE, """
    small,base,large,giant 14 518 vit_{}_patch14_reg4_dinov2.lvd142m""",
        dict(layer_scale=1e-5, registers=4), resize=Resize(antialias=True)),
    Family("DINOv3", "LayerScale, registers, rope (SwiGLU in plus)",
        "DINOv3 License (the authors' own files are gated)", """
    small,base,large                 16 256 vit_{}_patch16_dinov3.lvd1689m
    small=small_plus,huge+=huge_plus 16 256 vit_{}_patch16_dinov3.lvd1689m
    small,base,large                 16 256 vit_{}_patch16_dinov3_qkvb.lvd1689m""",
        dict(positions="rope", layer_scale=1e-5, eps=1e-5, registers=4)),
    Family("EUPE", "LayerScale, registers, rope",
        "FAIR Noncommercial Research License (no commercial use)", """
    tiny,small,base 16 256 vit_{}_patch16_dinov3_qkvb.eupe_lvd1689m""",
        dict(positions="rope", layer_scale=1e-5, eps=1e-5, registers=4)),
    Family("CLIP (OpenAI's)", "a norm before the blocks, QuickGELU", "MIT", """
    base  32,16 224  vit_{}_patch{p}_clip_quickgelu_{i}.openai vit_{}_patch{p}_clip_{i}.openai
    large 14 224,336 vit_{}_patch{p}_clip_quickgelu_{i}.openai vit_{}_patch{p}_clip_{i}.openai""",
        dict(norm_pre=True, eps=1e-5, activation="quick_gelu", classes=0), CLIP,
        Resize(antialias=True), TIMM),
    Family("CLIP (LAION's)", "a norm before the blocks", "MIT", """
    base 32,16 224 vit_{}_patch{p}_clip_224.laion2b
    huge 14    224 vit_{}_patch{p}_clip_224.laion2b""",
        dict(norm_pre=True, eps=1e-5, classes=0), CLIP, Resize(antialias=True)),
    Family("SigLIP 2", "no class token", APACHE, """
    base       16 224     vit_{}_patch{p}_siglip_{i}.v2_webli
    base,large 16 256,384 vit_{}_patch{p}_siglip_{i}.v2_webli
    so400m     14 224     vit_{}_patch{p}_siglip_{i}.v2_webli""",
        dict(class_token=False), HALF, Resize(mode="bilinear")),
)  # fmt: skip


class PublicViT(NamedTuple):
    name: str
    family: Family | None  # None: a plain ViT, of which only a size is told
    dim: int
    depth: int
    heads: int
    patch: int
    image_size: int  # pixels per side that it was trained at
    url: str


def list_models(family: Family) -> list[PublicViT]:
    found = []
    for row in family.models.strip().split("\n"):
        sizes, patches, image_sizes, name, *file = row.split()
        for size, p, i in product(*(x.split(",") for x in (sizes, patches, image_sizes))):
            size, _, word = size.partition("=")
            words = dict(p=p, i=i, name=name.format(word or size, p=p, i=i))
            url = family.files.format("".join(file).format(word or size, **words))
            url = url if file else TIMM.format(words["name"])
            found.append(PublicViT(words["name"], family, *ALL_SIZES[size], int(p), int(i), url))
    return found


MODELS = {model.name: model for family in FAMILIES for model in list_models(family)}


def locate(source: str) -> tuple[PublicViT, str]:
    """The model that NAME, NAME=FILE or SIZE=FILE names, and the path or URL of its file.

    What follows the dot of NAME may be left out where only one matches.
    """
    name, _, file = source.partition("=")
    if file and name in ALL_SIZES:
        return PublicViT(name, None, *ALL_SIZES[name], 0, 0, file), file
    alike = [model for full, model in MODELS.items() if full.split(".")[0] == name]
    if model := MODELS.get(name) or (alike[0] if len(alike) == 1 else None):
        return model, file or model.url
    close = [model.name for model in alike] or difflib.get_close_matches(name, MODELS)
    close = [f"{source}/model.pt"] if Path(source, "model.pt").is_file() else close
    advice = f"is it {' or '.join(close)}?" if close else "python -m teachers lists them"
    raise FileNotFoundError(f"{source} is neither a file nor a public ViT's name ({advice})")


def recognise(place: str) -> PublicViT | None:
    """The model whose file this path or URL is: by its authors' name, or a folder's for timm's."""
    path = PurePosixPath(place.partition("?")[0].replace("\\", "/"))
    shared = path.name in ("model.safetensors", "checkpoint_teacher.pth")  # names of many files
    known = {PurePosixPath(model.url).name: model for model in MODELS.values()} | MODELS
    names = path.parts[:-1] if shared else (path.name, path.stem)
    return next((known[name] for name in names if name in known), None)
