"""All settings, the data sets, and a recipe for each kind of them.

A setting without help works like the others, but --help does not list it. A recipe changes
defaults. Those below are for training from scratch. Each method's file shows what it changes.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from common.settings import Base, Recipes, setting

SIZES = {  # width, depth, heads
    "nano": (32, 2, 4), "micro": (64, 4, 4), "mini": (128, 6, 4), "tiny": (192, 12, 3),
    "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16),
}  # fmt: skip
NORMALIZATION = "mean and std of a file that names none"
NORMALIZATIONS = {  # mean and std of pixels in 0..1, as public ViTs were trained
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5,) * 3, (0.5,) * 3),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "none": ((0.0,), (1.0,)),
    "bytes": ((0.0,), (1 / 255,)),
}


class DataSet(NamedTuple):
    module: str  # of datasets/, whose `load` returns its sources.Parts
    image_size: int
    mean: tuple[float, ...]  # of the pixels, for each channel: a new ViT normalises with these
    std: tuple[float, ...]
    crop_pct: float = 1.0  # share of the image's side that evaluation sees


DATA_SETS = {
    "scenes": DataSet("scenes", 24, (0.25,), (0.35,)),
    "scenes-cifar10": DataSet("scenes", 24, (0.47,) * 3, (2.0,) * 3),  # an eighth of the contrast
    "digits": DataSet("digits", 12, (0.25,), (0.35,)),
    "cifar10": DataSet("cifar", 32, *NORMALIZATIONS["cifar10"]),
    "cifar100": DataSet("cifar", 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": DataSet("folders", 224, *NORMALIZATIONS["imagenet"], 0.875),
    "folder": DataSet("folders", 96, *NORMALIZATIONS["imagenet"], 0.875),
}

OF_PHOTOS = "cifar imagenet folder"  # data sets
OF_FILES = f"{OF_PHOTOS} scenes-cifar10"
CROP = "RandomResizedCrop: smallest scale (0: random shifts)"


@dataclass(frozen=True)
class Images(Base):
    data: str = setting("scenes", "data set: " + ", ".join(DATA_SETS), tuple(DATA_SETS))
    data_dir: str = setting("", "folder of the images [data/DATA]", free=True, only=OF_FILES)
    image_size: int = setting(0, "pixels per side (0: the data set's own)", high=4096)
    holdout: float = setting(-1.0, "validation share (-1: 0.2 if no val/, test/)", low=-1, high=0.9)
    distractors: int = setting(1, high=20, only="digits")  # beside a digit of --data digits
    scene: str = setting("pointer", "pointer or twins", ("pointer", "twins"), only="scenes")
    dial: float = setting(0.0, high=1, only="scenes")  # share of pointers that point to one cell
    classes: str = setting("all", only="digits scenes")  # which are shown, written like --layers
    label: str = setting("class", choices=("class", "cell"), only="scenes")  # (cell: to measure)
    workers: int = setting(8, "processes that decode images, per GPU", free=True)
    device: str = setting("auto", "cpu, cuda, mps, or auto", free=True)


@dataclass(frozen=True)
class Settings(Images):
    """How to train: images, net, optimisation, and what the run leaves."""

    method: ClassVar[Any]  # names the run's folder
    teacher = ""  # a setting of most methods
    num_labels: int = setting(0, "labelled images, equally many per class (0: all)")
    subset_seed: int = setting(-1, low=-1)  # draws them (-1: seed does)
    seed: int = setting(0, "random seed of everything", high=2**63 - 1)
    crop_area: float = setting(0.0, CROP, high=1, only=OF_PHOTOS)
    flip: float = setting(0.5, "share of images to flip, left to right", high=1, only=OF_PHOTOS)
    randaugment: int = setting(0, "RandAugment magnitude (0: off)", high=10, only=OF_PHOTOS)
    random_erase: float = setting(0.0, high=1, only=OF_PHOTOS)  # probability of random erasing
    mixup: float = setting(0.0, "MixUp alpha (0: off)")
    cutmix: float = setting(0.0, "CutMix alpha (0: off)")
    smoothing: float = setting(0.0, "label smoothing", high=0.99)
    batch: int = setting(64, "images per step, over all GPUs (0: 1/8 of the images, at most 64)")
    recipe: str = setting("", "gpu: larger, longer (not measured)", ("", "gpu"), only="cifar")
    model: str = setting("micro", "size of the ViT: nano to huge")
    patch: int = setting(3, "pixels per side of a patch", low=1)
    positions: str = setting("sincos", choices=("sincos", "random"))  # (fine-tuning: the teacher's)
    drop_path: float = setting(0.0, "drop path rate of the last block", high=0.99)
    epochs: int = setting(450, "passes over the training images, in full batches", low=1)
    warmup: float = setting(0.1, "fraction of training with linear warm-up", high=0.99)
    blr: float = setting(1e-3, "learning rate per 256 images of --batch")
    lr: float = setting(0.0, "learning rate itself (0: from --blr)")
    final_lr: float = setting(0.0, high=1)  # at the end of the cosine, as a share of the peak
    weight_decay: float = setting(0.05, "AdamW weight decay (biases, norms, positions: none)")
    beta2: float = setting(0.999, high=0.9999)  # AdamW's second; the first is 0.9
    layer_decay: float = setting(1.0, "layer-wise learning-rate decay (1: off)", low=0.01, high=1)
    clip: float = setting(0.0)  # largest gradient norm (0: no limit)
    ema: float = setting(0.0, "EMA decay of the weights (0: off)", high=0.999999)
    eval_every: int = setting(1, low=1, free=True)  # epochs between validations
    out: str = setting("", "folder of the run [runs/METHOD-DATA-MODEL-sSEED]", free=True)
    resume: bool = setting(False, "continue the run in --out", free=True)
    overwrite: bool = setting(False, "start over, though --out holds a run", free=True)
    save_every: int = setting(600, free=True)  # seconds between checkpoints within an epoch
    amp: str = setting("auto", "precision: auto, off, bf16, fp16", ("auto", "off", "bf16", "fp16"))
    micro_batch: int = setting(0, free=True)  # images at a time per GPU (0: all that fit)
    compile: str = setting(
        "auto", "auto, off, on, graphs", ("auto", "off", "on", "graphs"), free=True
    )


@dataclass(frozen=True)
class TransferSettings(Settings):
    teacher: str = setting(
        "auto", "auto, pretrain, random, mae, NAME (python -m teachers), file or URL", free=True
    )
    normalization: str = setting("", NORMALIZATION, ("", *NORMALIZATIONS))
    layers: str = setting("all", "layers to transfer: :18 or 6:12 or -6: or 0,2,4 or 75% or all")
    teacher_layers: str = setting("", "teacher layers paired with --layers [the same]")
    heads: str = setting("all")  # the teacher's heads to use, written like --layers


PHOTOS = dict(random_erase=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1)
RECIPES: Recipes = {  # training from scratch; each method changes what differs
    # Accuracies of scenes, digits and CIFAR-10: study/results/, in the table that is named.
    "scenes": dict(patch=8, classes="5:", num_labels=100, epochs=300, blr=4e-3, weight_decay=0.5,
                   clip=1.0, eval_every=30),  # 28.7 (scenes-steps)
    "digits": dict(num_labels=100, epochs=450, batch=50, blr=0.01024, weight_decay=0.5, clip=1.0,
                   eval_every=45),  # 80.7 (fair-main)
    "cifar": dict(model="mini", patch=4, num_labels=5000, epochs=25, warmup=0.05, batch=100,
                  blr=2.56e-3, final_lr=1e-3, weight_decay=0.3, clip=1.0, eval_every=5),
    # CIFAR-10 as JPEGs: 55.7 (why-cifar10). What --recipe gpu gives was not measured:
    "cifar_gpu": dict(model="tiny", patch=4, drop_path=0.1, epochs=100, warmup=0.05, batch=512,
                      blr=5e-4, final_lr=1e-3, clip=1.0, ema=0.999, **PHOTOS),
    # MAE's for ViT-L from scratch (appendix A.2; a batch of 4096 there), not run here
    "imagenet": dict(model="large", patch=16, positions="random", drop_path=0.2, epochs=200,
                     batch=2048, blr=1e-4, final_lr=1.25e-3, weight_decay=0.3, beta2=0.95,
                     ema=0.9999, crop_area=0.08, randaugment=9, **PHOTOS),
    # The rate is tuned on 2,000 photographs of 96 pixels (photos-tuning), the rest is not:
    "folder": dict(model="mini", patch=16, drop_path=0.1, epochs=100, warmup=0.05, batch=0,
                   blr=8e-4, final_lr=1e-3, clip=1.0, ema=0.999, eval_every=5, crop_area=0.3,
                   **PHOTOS),
}  # fmt: skip
