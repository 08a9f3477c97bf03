"""Where teachers come from: a masked autoencoder (MAE).

He et al., "Masked Autoencoders Are Scalable Vision Learners", 2022. Most
patches of an image are masked. The ViT sees the rest, and a light decoder has
to reconstruct what is missing. For that the ViT must learn where to look. It
needs no label. On scenes, the default, the ViT sees all patches instead, and
predicts the pixels of the cell asked for.

    python pretrain.py                             scenes, a minute on 2 cores
    python pretrain.py --data digits               masked, minutes on 2 cores
    python pretrain.py --data cifar10 --data-dir cifar10
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

import data
import recipes
import train
import vit
from common import checkpoints, launch
from common.settings import format_flag, merge_recipes, parse_settings, setting
from teachers.load import new_vit
from teachers.positions import make_sincos


@dataclass(frozen=True)
class Settings(recipes.Settings):
    method = "pretrain"
    mask_ratio: float = setting(0.6, "share masked (--target masked)", low=0.05, high=0.95)
    decoder_dim: int = setting(48, "width of the decoder", low=4)
    decoder_depth: int = setting(1, "blocks of the decoder")
    decoder_heads: int = setting(4, "heads of the decoder", low=1)
    norm_pix_loss: bool = setting(False, "compare pixels normalised within their patch")
    target: str = setting("masked", "masked patches, or a cell", ("masked", "cell"), only="scenes")


LABELS = {"mixup", "cutmix", "smoothing"}  # settings that need them
DECODER = {"decoder_dim", "decoder_depth", "decoder_heads", "mask_ratio", "norm_pix_loss"}
UNUSED = {"masked": LABELS, "cell": LABELS | DECODER}  # by --target
SHARED = dict(num_labels=0, weight_decay=0.05, beta2=0.95, ema=0.0, final_lr=0.0, drop_path=0.0)
PHOTOS = dict(random_erase=0.0, randaugment=0, mixup=0.0, cutmix=0.0, mask_ratio=0.75, clip=0.0)
RECIPES = merge_recipes(
    recipes.RECIPES,
    scenes=SHARED | dict(target="cell", classes=":5", epochs=13, blr=8e-3),
    digits=SHARED | dict(epochs=300, batch=128, blr=4e-3),
    cifar=SHARED | PHOTOS | dict(  # weights/cifar10.pt: a loss of 0.455
        epochs=60, batch=512, blr=7.5e-4, decoder_dim=96, norm_pix_loss=True,
    ),
    cifar_gpu=SHARED | PHOTOS | dict(
        epochs=400, warmup=0.05, batch=1024, blr=2.5e-4, decoder_dim=128, decoder_depth=2,
        norm_pix_loss=True,
    ),
    imagenet=SHARED | PHOTOS | dict(  # MAE's PRETRAIN.md, ViT-L. The published weights: 1600 epochs
        epochs=800, warmup=0.05, batch=4096, blr=1.5e-4, crop_area=0.2, decoder_dim=512,
        decoder_depth=8, decoder_heads=16, norm_pix_loss=True, positions="sincos",
    ),
    folder=SHARED | PHOTOS | dict(
        epochs=150, warmup=0.067, blr=4e-3, crop_area=0.2, decoder_dim=128, norm_pix_loss=True,
    ),
)  # fmt: skip
parse = partial(parse_settings, __doc__, Settings, RECIPES)


class MAE(nn.Module):
    """An encoder that sees the visible patches, and a decoder that reconstructs all patches."""

    def __init__(self, encoder: vit.ViT, settings: Settings):
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        grid, self.norm_pix_loss = self.config.grid_size, settings.norm_pix_loss
        self.patches = grid**2
        self.visible = max(1, int(self.patches * (1 - settings.mask_ratio)))
        dim, depth, heads = settings.decoder_dim, settings.decoder_depth, settings.decoder_heads
        if dim % heads:
            raise ValueError(f"--decoder-heads {heads}: must divide --decoder-dim {dim}")
        self.decoder_embed = nn.Linear(self.config.dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        decoder = replace(self.config, classes=0, dim=dim, depth=depth, heads=heads)
        self.decoder_blocks = nn.ModuleList(vit.Block(decoder) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, self.config.patch**2 * self.config.channels)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(vit.initialise)
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder_pos_embed = nn.Parameter(make_sincos(grid, dim), requires_grad=False)
        encoder.pos_embed.requires_grad_(settings.positions == "random")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstructed patches (B, N, p*p*c), and the mask (B, N): 1 where masked."""
        noise = torch.rand(len(images), self.patches, device=images.device)
        ids_shuffle = noise.argsort(dim=1)  # another order for each image
        ids_restore, visible_ids = ids_shuffle.argsort(dim=1), ids_shuffle[:, : self.visible]
        x = choose_patches(self.encoder.embed(images), visible_ids)
        factors = self.encoder.draw_drop_path(len(x))
        for block, of_block in zip(self.encoder.blocks, factors, strict=True):
            x, _ = block(x, None, of_block)
        x = self.decoder_embed(self.encoder.fc_norm(x))  # (B, 1 + visible, decoder's dim)

        masked = self.mask_token.to(x.dtype).expand(len(x), self.patches - self.visible, -1)
        x = choose_patches(torch.cat([x, masked], dim=1), ids_restore) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x, _ = block(x)
        reconstructed = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        return reconstructed, (ids_restore >= self.visible).float()

    def get_target(self, images: Tensor) -> Tensor:
        """Pixels of each patch (B, N, p*p*c), with --norm-pix-loss normalised (MAE, section 4)."""
        pixels = patchify(self.encoder.normalise(images), self.config.patch)
        if not self.norm_pix_loss:
            return pixels
        mean, variance = pixels.mean(-1, keepdim=True), pixels.var(-1, keepdim=True)
        return (pixels - mean) / (variance + 1e-6).sqrt()


def choose_patches(tokens: Tensor, ids: Tensor) -> Tensor:
    """The class token, and the patches that `ids` (B, n) name, in their order: (B, 1 + n, D)."""
    patches = tokens[:, 1:].gather(1, repeat(ids, "b n -> b n d", d=tokens.shape[-1]))
    return torch.cat([tokens[:, :1], patches], dim=1)


def loss(mae: MAE, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of the masked patches."""
    reconstructed, mask = mae(images)
    error = (reconstructed - mae.get_target(images)).square().mean(dim=-1)  # (B, N), per patch
    return (error * mask).sum() / mask.sum(), {}


def loss_cell(net: vit.ViT, images: Tensor, cells: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of the pixels of the cells (B,) that scenes ask for. No class is seen."""
    side = math.isqrt(net.config.classes // net.config.channels)  # `net` has an output for each
    pixels = patchify(net.normalise(images), side)  # (B, cells, side * side * c)
    asked = pixels[torch.arange(len(images), device=images.device), cells]
    return F.mse_loss(net(images), asked), {}


def patchify(images: Tensor, patch: int) -> Tensor:
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def export(mae: MAE) -> dict:
    """The encoder alone. MAE calls its last norm `norm`; `fc_norm` precedes a head."""
    weights = {k.replace("fc_norm", "norm"): v for k, v in mae.encoder.state_dict().items()}
    return checkpoints.export(mae.encoder) | {"model": weights}


def task(settings: Settings, dataset: data.Data) -> train.Task:
    torch.manual_seed(settings.seed)
    if settings.target == "masked":
        mae = MAE(new_vit(settings, dataset, classes=0), settings)
        return train.Task(mae.to(dataset.train.device), dataset, loss, predict=None, export=export)
    side = dataset.image_size // math.isqrt(len(dataset.classes))  # of a cell
    net = new_vit(settings, dataset, classes=len(dataset.mean) * side**2)
    return train.Task(net.to(dataset.train.device), dataset, loss_cell, predict=None)


def main(settings: Settings) -> dict:
    target, unused = settings.target, sorted(settings.given & UNUSED[settings.target])
    if unused:
        raise ValueError(f"{format_flag(unused[0])} has no effect with --target {target}")
    dataset = data.load(replace(settings, label="cell") if target == "cell" else settings)
    return train.fit(task(settings, dataset), settings)


if __name__ == "__main__":
    launch.run(main, parse)
