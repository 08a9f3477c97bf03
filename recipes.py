"""The settings that all methods share, and a recipe for each kind of data set.

A setting without help works like the others, but --help does not list it. A recipe changes
defaults. Those below are for training from scratch. Each method's file shows what it changes.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import data
from common.settings import Recipes, setting
from datasets.sources import normalization_setting


@dataclass(frozen=True)
class Settings(data.Settings):
    method: ClassVar[Any]  # names the run's folder
    teacher = ""  # a setting of most methods
    model: str = setting("micro", "size of the ViT: nano to huge")
    patch: int = setting(3, "pixels per side of a patch", low=1)
    positions: str = setting("sincos", choices=("sincos", "random"))  # that training starts from
    drop_path: float = setting(0.0, "drop path: probability in the last block", high=0.99)
    epochs: int = setting(450, "passes over the training images", low=1)
    warmup: float = setting(0.1, "share of the epochs with a rising rate", high=0.99)
    blr: float = setting(0.0, "learning rate per 256 images of --batch")
    lr: float = setting(0.0, "learning rate itself (0: from --blr)")
    final_lr: float = setting(0.0, high=1)  # at the end of the cosine, as a share of the peak
    weight_decay: float = setting(0.05, "AdamW's, for matrices only")
    beta2: float = setting(0.999, high=0.9999)  # AdamW's second; the first is 0.9
    layer_decay: float = setting(1.0, "factor on the rate per layer below the head", high=1)
    clip: float = setting(0.0)  # largest gradient norm (0: no limit)
    ema: float = setting(0.0, "decay of the average of the weights (0: none)", high=0.999999)
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
    normalization: str = normalization_setting()
    layers: str = setting("all", "layers to transfer: :18 or 6:12 or -6: or 0,2,4 or 75% or all")
    teacher_layers: str = setting("", "the teacher's layers to take for these [the same]")
    heads: str = setting("all")  # the teacher's heads to use, written like --layers


PHOTOS = dict(random_erase=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1)
RECIPES: Recipes = {  # training from scratch; each method changes what differs
    "scenes": dict(patch=8, classes="5:", num_labels=300, drop_path=0.1, epochs=75, blr=3.2e-2,
                   weight_decay=0.5, clip=1.0, eval_every=7),
    "digits": dict(num_labels=100, epochs=450, batch=50, blr=0.01024, weight_decay=0.5, clip=1.0,
                   eval_every=45),
    "cifar": dict(model="tiny", patch=4, drop_path=0.1, epochs=100, warmup=0.05, batch=512,
                  blr=5e-4, final_lr=1e-3, clip=1.0, ema=0.999, **PHOTOS),
    # MAE's for ViT-L from scratch (appendix A.2; a batch of 4096 there), not run here
    "imagenet": dict(model="large", patch=16, positions="random", drop_path=0.2, epochs=200,
                     batch=2048, blr=1e-4, final_lr=1.25e-3, weight_decay=0.3, beta2=0.95,
                     ema=0.9999, crop_area=0.08, randaugment=9, **PHOTOS),
    "folder": dict(model="mini", patch=16, drop_path=0.1, epochs=100, warmup=0.05, batch=0,
                   blr=4e-3, final_lr=1e-3, clip=1.0, ema=0.999, eval_every=5, crop_area=0.3,
                   **PHOTOS),
}  # fmt: skip
