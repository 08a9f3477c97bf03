"""The baselines: fine-tuning takes over a teacher's weights, training from scratch takes over nothing.

    python finetune.py                                   digits, from a teacher pre-trained here first if need be
    python finetune.py --teacher none                    from scratch
    torchrun --nproc_per_node=8 finetune.py --data imagenet --data-dir /imagenet --micro-batch 128
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import pretrain
import train
import vit

RECIPE = {  # ImageNet: MAE's FINETUNE.md, ViT-L
    # name            digits   cifar   imagenet
    "model":         ("micro", "tiny", "large"),
    "patch":         (3,       4,      16),
    "teacher":       ("auto",  "auto", "auto"),
    "labels":        (100,     0,      0),
    "epochs":        (450,     100,    50),
    "warmup":        (45,      5,      5),
    "batch":         (50,      512,    1024),
    "lr":            (4e-3,    1e-3,   4e-3),
    "min_lr":        (0.0,     1e-6,   1e-6),
    "weight_decay":  (0.05,    0.05,   0.05),
    "beta2":         (0.999,   0.999,  0.999),
    "layer_decay":   (0.75,    0.75,   0.75),
    "clip":          (1.0,     1.0,    0.0),
    "ema":           (0.0,     0.999,  0.0),
    "drop_path":     (0.0,     0.1,    0.2),
    "crop_area":     (0.0,     0.0,    0.08),
    "randaugment":   (0,       0,      9),
    "erase":         (0.0,     0.25,   0.25),
    "mixup":         (0.0,     0.8,    0.8),
    "cutmix":        (0.0,     1.0,    1.0),
    "smoothing":     (0.0,     0.1,    0.1),
    "eval_every":    (45,      1,      1),
}  # fmt: skip
SCRATCH = {  # what differs with --teacher none. ImageNet: the distillation recipe, less the teacher
    # name            digits   cifar   imagenet
    "epochs":        (450,     100,    200),
    "warmup":        (45,      5,      20),
    "batch":         (50,      512,    2048),
    "lr":            (4e-3,    1e-3,   8e-4),
    "weight_decay":  (0.5,     0.05,   0.3),
    "beta2":         (0.999,   0.999,  0.95),
    "layer_decay":   (1.0,     1.0,    1.0),
    "ema":           (0.0,     0.999,  0.9999),
}  # fmt: skip
FLAGS = data.FLAGS | train.FLAGS


def loss(net: vit.ViT, images: Tensor, labels: Tensor, smoothing: float = 0.0) -> dict[str, Tensor]:
    logits, _ = net(images)
    return {"class": F.cross_entropy(logits, labels, label_smoothing=smoothing)}


def predict(net: vit.ViT, images: Tensor) -> Tensor:
    return net(images)[0]


def options(argv: list[str]):
    scratch = train.options(__doc__, RECIPE, FLAGS, argv).teacher == "none"
    return train.options(__doc__, RECIPE | (SCRATCH if scratch else {}), FLAGS, argv)


def main(args) -> dict:
    device = train.device(args)
    if args.teacher == "random":
        raise ValueError("--teacher random: fine-tuning random weights is training from scratch, --teacher none")
    teacher = pretrain.teacher(args)
    images = data.load(args, device, teacher and teacher.get("normalization"))
    torch.manual_seed(args.seed)
    if teacher:  # whose architecture is the student's: --model and --patch must not say otherwise
        net = vit.load(teacher, image_size=images.image_size, classes=len(images.classes), drop_path=args.drop_path)
        arch, named = net.architecture, (*vit.SIZES[args.model], args.patch, images.channels)
        if tuple(arch[k] for k in ("dim", "depth", "heads", "patch", "channels")) != named:
            raise ValueError(f"{teacher['source']} has width {arch['dim']}, depth {arch['depth']}, {arch['heads']} heads, "
                             f"patch {arch['patch']} and {arch['channels']} channels, unlike --model {args.model} "
                             f"--patch {args.patch} --data {args.data}: change these")  # fmt: skip
        nn.init.trunc_normal_(net.head.weight, std=2e-5)  # the first steps must not shake what is already good (MAE)
    else:
        net = vit.build(args.model, image_size=images.image_size, patch=args.patch, channels=images.channels,
                        classes=len(images.classes), drop_path=args.drop_path)  # fmt: skip

    def card(net: vit.ViT) -> dict:
        return {"model": net.state_dict(), "architecture": net.architecture, "classes": images.classes,
                "normalization": images.normalization, "method": name}  # fmt: skip

    name = "finetune" if teacher else "scratch"
    return train.fit(net.to(device), lambda *step: loss(*step, args.smoothing), predict, images, args, name, card)


if __name__ == "__main__":
    train.run(main, options)
