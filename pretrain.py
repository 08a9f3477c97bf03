"""Where teachers come from: a masked autoencoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", 2022).

Most patches of an image are hidden; the ViT sees the rest, and a light decoder has to paint what is missing. To do so
the ViT must learn where to look. No label is used.

    python pretrain.py                                                 the built-in digits, a minute on 2 cores
    python pretrain.py --data cifar10 --data-dir cifar10
    torchrun --nproc_per_node=8 pretrain.py --data imagenet --data-dir /imagenet --micro-batch 64
    python pretrain.py --show out.png                                  original, masked, reconstructed, from --out

The other scripts call this one when they need a teacher for the digits or CIFAR and find none.
"""

from pathlib import Path

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

import data
import train
import vit

RECIPE = {  # ImageNet: MAE's PRETRAIN.md (ViT-L, 800 epochs; the published weights saw 1600)
    # name            digits   cifar   imagenet
    "model":         ("micro", "tiny", "large"),
    "patch":         (3,       4,      16),
    "mask":          (0.6,     0.75,   0.75, "share of the patches that is hidden"),
    "decoder_dim":   (48,      128,    512,  "width of the decoder"),
    "decoder_depth": (1,       2,      8,    "blocks of the decoder"),
    "decoder_heads": (4,       4,      16,   "heads of the decoder"),
    "norm_pixels":   (False,   True,   True, "the pixels of each patch are normalised before they are compared"),
    "labels":        (0,       0,      0),
    "epochs":        (300,     400,    800),
    "warmup":        (30,      20,     40),
    "batch":         (128,     1024,   4096),
    "lr":            (2e-3,    1e-3,   2.4e-3),
    "min_lr":        (0.0,     0.0,    0.0),
    "weight_decay":  (0.05,    0.05,   0.05),
    "beta2":         (0.95,    0.95,   0.95),
    "layer_decay":   (1.0,     1.0,    1.0),
    "clip":          (1.0,     0.0,    0.0),
    "ema":           (0.0,     0.0,    0.0),
    "crop_area":     (0.0,     0.0,    0.2),
    "randaugment":   (0,       0,      0),
    "erase":         (0.0,     0.0,    0.0),
}  # fmt: skip
FLAGS = data.FLAGS | train.FLAGS | {"show": ("", "paint what the model of --out reconstructs into this PNG, and train nothing")}


class MAE(nn.Module):
    """An encoder that sees the patches left over, and a decoder that paints all of them."""

    def __init__(self, encoder: vit.ViT, mask: float, dim: int, depth: int, heads: int, norm_pixels: bool = True):
        super().__init__()
        arch = encoder.architecture
        self.encoder, self.patch, self.norm_pixels = encoder, arch["patch"], norm_pixels
        self.patches = encoder.tokens - 1
        self.seen = int(self.patches * (1 - mask))
        if not 0 < self.seen < self.patches:
            raise ValueError(f"--mask {mask} leaves {self.seen} of {self.patches} patches: some must be seen, some hidden")
        self.embed = nn.Linear(arch["dim"], dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(vit.Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.paint = nn.Linear(dim, self.patch**2 * arch["channels"])
        for part in (self.embed, self.blocks, self.paint):
            part.apply(vit.initialise)
        nn.init.normal_(self.mask_token, std=0.02)
        side = round(self.patches**0.5)
        self.positions = nn.Parameter(sincos(side, dim), requires_grad=False)
        encoder.pos_embed = nn.Parameter(sincos(side, arch["dim"]), requires_grad=False)  # fixed while pre-training

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The painted patches (B, N, pixels of a patch), and a mask (B, N): 1 where the patch was hidden."""
        x = self.encoder.embed(images)
        order = torch.rand(len(x), self.patches, device=x.device).argsort(dim=1)  # a random order for each image
        seen, back = order[:, : self.seen], order.argsort(dim=1)
        patches = x[:, 1:].gather(1, repeat(seen, "b n -> b n d", d=x.shape[-1]))
        x, _ = self.encoder.encode(torch.cat([x[:, :1], patches], dim=1))
        x = self.embed(self.encoder.fc_norm(x))  # (B, 1 + seen, decoder width)

        hidden = self.mask_token.to(x.dtype).expand(len(x), self.patches - self.seen, -1)
        patches = torch.cat([x[:, 1:], hidden], dim=1).gather(1, repeat(back, "b n -> b n d", d=x.shape[-1]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.positions
        for block in self.blocks:
            x, _ = block(x)
        return self.paint(self.norm(x))[:, 1:], (back >= self.seen).float()

    def target(self, images: Tensor) -> Tensor:
        """The pixels of each patch (B, N, p*p*c), normalised within the patch (MAE, section 4: better features)."""
        pixels = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        if not self.norm_pixels:
            return pixels
        return (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()


def loss(mae: MAE, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    painted, mask = mae(images)
    error = (painted - mae.target(images)).square().mean(dim=-1)  # (B, N), per patch
    return {"pixels": (error * mask).sum() / mask.sum()}  # hidden patches only


def sincos(side: int, dim: int) -> Tensor:
    """MAE's fixed positions (1, 1 + side^2, dim): half of them waves of x, half of y; zeros for the class token."""
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width that divides by 4, not {dim}")
    rate = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    y, x = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    angles = [rearrange(axis, "h w -> (h w) 1") * rate for axis in (x, y)]
    grid = torch.cat([wave for a in angles for wave in (a.sin(), a.cos())], dim=1)
    return torch.cat([torch.zeros(1, dim), grid])[None].float()


def options(argv: list[str]):
    return train.options(__doc__, RECIPE, FLAGS, argv)


def build(args, images: data.Data) -> MAE:
    torch.manual_seed(args.seed)
    encoder = vit.build(args.model, image_size=images.image_size, patch=args.patch, channels=images.channels, classes=0)
    return MAE(encoder, args.mask, args.decoder_dim, args.decoder_depth, args.decoder_heads, args.norm_pixels)


def main(args) -> dict | None:
    device = train.device(args)
    images = data.load(args, device)
    mae = build(args, images).to(device)
    if args.show:
        return show(mae, images, args)

    def card(mae: MAE) -> dict:  # the encoder alone, under MAE's names: its last norm is not the one before a head
        weights = {k.replace("fc_norm", "norm"): v for k, v in mae.encoder.state_dict().items()}
        return {"model": weights, "architecture": mae.encoder.architecture, "classes": images.classes,
                "normalization": images.normalization, "method": "pretrain"}  # fmt: skip

    return train.fit(mae, loss, None, images, args, "pretrain", card)


# Teachers ---------------------------------------------------------------------------------------------------------------


def teacher(args) -> dict | None:
    """The checkpoint that --teacher names (see `vit.read`): auto, mae, a path or URL; None for random and none.

    auto is a ViT pre-trained here: it is made first if it is not there yet. For ImageNet, where that takes days, auto
    is MAE's published one.
    """
    if args.teacher in ("none", "random"):
        return None
    here = args.data == "digits" or args.data.startswith("cifar")
    if args.teacher == "mae" or (args.teacher == "auto" and not here):
        if args.model not in ("base", "large", "huge"):
            raise ValueError(f"MAE published no '{args.model}' teacher: choose --model base, large or huge, or "
                             "pre-train one (pretrain.py) and name it with --teacher")  # fmt: skip
        return vit.read(vit.MAE_WEIGHTS.format(args.model))
    if args.teacher != "auto":
        checkpoint = vit.read(args.teacher)
        if "teacher" in checkpoint:
            raise ValueError(f"{args.teacher} is a student of attention copy: it never learned where to look by itself, so "
                             "it can be no teacher (name the teacher it had)")  # fmt: skip
        return checkpoint
    out = Path("runs") / f"pretrain-{args.data}-{args.model}-s{args.seed}"
    if not (out / "model.pt").is_file():
        train.say(f"No teacher at {out / 'model.pt'} yet: pre-training one first.")
        own = options(["--data", args.data])
        shared = (*data.FLAGS, "model", "patch", "seed", "device", "amp", "compile", "save_every")
        own.__dict__.update({k: v for k, v in vars(args).items() if k in shared} | {"labels": 0, "holdout": 0})
        own.out, own.resume = str(out), True
        main(own)
        train.say("The teacher is ready. Now the student:")
    return vit.read(out / "model.pt")


def show(mae: MAE, images: data.Data, args) -> None:
    import matplotlib.pyplot as plt

    last = Path(args.out or f"runs/pretrain-{args.data}-{args.model}-s{args.seed}") / "last.pt"
    if not last.is_file():
        raise FileNotFoundError(f"no run at {last}: pre-train first, or say where with --out")
    try:
        mae.load_state_dict(torch.load(last, map_location="cpu", weights_only=True)["net"])
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{last} holds no masked autoencoder of these sizes ({str(error).splitlines()[0]})") from error
    figure = picture(mae.eval(), next(images.val.plainly(8))[0], images.normalization)
    figure.savefig(args.show, dpi=150)
    plt.close(figure)
    train.say(f"wrote {args.show}")


@torch.no_grad()
def picture(mae: MAE, images: Tensor, normalization):
    """A matplotlib figure with three rows: the images, what the encoder sees of them, and what the decoder makes of it."""
    import matplotlib.pyplot as plt

    painted, mask = mae(images)
    if mae.norm_pixels:  # the decoder does not know a patch's mean and deviation: they are taken from the original
        pixels = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=mae.patch, q=mae.patch)
        painted = painted * (pixels.var(-1, keepdim=True) + 1e-6).sqrt() + pixels.mean(-1, keepdim=True)
    side = round(mae.patches**0.5)
    fold = dict(h=side, p=mae.patch, q=mae.patch)
    painted = rearrange(painted, "b (h w) (p q c) -> b c (h p) (w q)", **fold)
    hidden = repeat(mask, "b (h w) -> b 1 (h p) (w q)", **fold)
    mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in normalization)
    rows = {"original": images, "seen": images, "painted": images * (1 - hidden) + painted * hidden}
    figure, axes = plt.subplots(3, len(images), figsize=(len(images), 3.2), squeeze=False, layout="constrained")
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        pixels = (pictures * std + mean).clamp(0, 1)
        if name == "seen":
            pixels = pixels * (1 - hidden) + 0.6 * hidden
        for axis, one in zip(line, pixels.cpu(), strict=True):
            axis.imshow(rearrange(one, "c h w -> h w c").expand(-1, -1, 3).numpy())
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    return figure


if __name__ == "__main__":
    train.run(main, options)
