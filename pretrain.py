"""Where teachers come from: a masked autoencoder (MAE).

He et al., "Masked Autoencoders Are Scalable Vision Learners", 2022. Most
patches of an image are masked; the ViT sees the rest, and a light decoder has
to reconstruct what is missing. To do so the ViT must learn where to look. No
label is used.

    python pretrain.py                             digits, minutes on 2 cores
    python pretrain.py --data cifar10 --data-dir cifar10
    torchrun --nproc_per_node=8 pretrain.py --data imagenet \\
        --data-dir /imagenet
    python pretrain.py --reconstruct out.png       pictures of what it learned

The other scripts call this one when they need a teacher and find none (but for
ImageNet, which has a published one).
"""

import launch

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

import checkpoints
import data
import families
import pictures
import runs
import storage
import train
import vit
from augment import Normalization, to_pixels
from settings import COMMON, Setting, Settings, change, parse_settings

SETTINGS = change(  # ImageNet: MAE's PRETRAIN.md, ViT-L (the published weights saw 1600 epochs)
    {k: v for k, v in COMMON.items() if k not in
     ("drop_path", "eval_every", "mixup", "cutmix", "smoothing")},  # nothing that is about labels
    #             digits cifar imagenet folder
    num_labels=   0,
    epochs=       (300,  400,  800,  150),
    warmup=       (30,   20,   40,   10),
    batch=        (128,  1024, 4096),
    lr=           (2e-3, 1e-3, 2.4e-3),
    min_lr=       0.0,
    weight_decay= 0.05,
    beta2=        0.95,
    clip=         (1.0,  0.0,  0.0),
    ema=          0.0,
    crop_area=    (0.0,  0.0,  0.2,  0.2),
    randaugment=  0,
    random_erase= 0.0,
) | {
    "mask_ratio":    Setting((0.6, 0.75, 0.75), "share of the patches masked", low=0.05, high=0.95),
    "decoder_dim":   Setting((48, 128, 512), "width of the decoder", 4, 8192),
    "decoder_depth": Setting((1, 2, 8, 1), "blocks of the decoder", high=64),
    "decoder_heads": Setting((4, 4, 16), "heads of the decoder", 1, 512),
    "norm_pix_loss": Setting((False, True, True), "compare pixels normalised within their patch"),
    "reconstruct":   Setting("", "train nothing: show in this PNG what --out has learned"),
}  # fmt: skip
DECODER = [name for name in SETTINGS if name.startswith("decoder_")]
parse = partial(parse_settings, __doc__, SETTINGS)


class MAE(nn.Module):
    """An encoder that sees the visible patches, and a decoder that reconstructs all of them."""

    def __init__(
        self,
        encoder: vit.ViT,
        mask_ratio: float,
        dim: int,
        depth: int,
        heads: int,
        norm_pix_loss: bool = True,
    ):
        super().__init__()
        config = encoder.config
        self.encoder, self.config = encoder, config
        self.patch, self.norm_pix_loss = config.patch, norm_pix_loss
        self.patches = config.side**2
        self.visible = int(self.patches * (1 - mask_ratio))
        if not 0 < self.visible < self.patches:
            raise ValueError(
                f"--mask-ratio {mask_ratio} leaves {self.visible} of {self.patches} patches: "
                "some must be visible, some masked"
            )
        self.decoder_embed = nn.Linear(config.dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        plain = vit.Config(config.image_size, config.patch, config.channels, 0, dim, depth, heads)
        self.decoder_blocks = nn.ModuleList(vit.Block(plain) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, self.patch**2 * config.channels)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(vit.initialise)
        nn.init.normal_(self.mask_token, std=0.02)

        def fixed(width: int) -> nn.Parameter:
            positions = sincos(config.side, width)[:, 1 - config.class_token :]
            return nn.Parameter(positions, requires_grad=False)

        self.decoder_pos_embed = fixed(dim)
        if encoder.pos_embed is not None:
            encoder.pos_embed = fixed(config.dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstructed patches (B, N, p*p*c), and the mask (B, N): 1 where masked."""
        x, first = self.encoder.embed(images), self.encoder.config.prefix
        noise = torch.rand(len(x), self.patches, device=x.device)  # another order for each image
        ids_shuffle = noise.argsort(dim=1)
        ids_keep, ids_restore = ids_shuffle[:, : self.visible], ids_shuffle.argsort(dim=1)
        visible = x[:, first:].gather(1, repeat(ids_keep, "b n -> b n d", d=x.shape[-1]))
        x = self.encoder.encode(torch.cat([x[:, :first], visible], dim=1), seen=ids_keep)
        x = self.decoder_embed(self.encoder.fc_norm(x))  # (B, prefix + visible, decoder width)

        masked = self.mask_token.to(x.dtype).expand(len(x), self.patches - self.visible, -1)
        index = repeat(ids_restore, "b n -> b n d", d=x.shape[-1])
        patches = torch.cat([x[:, first:], masked], dim=1).gather(1, index)
        cls = self.encoder.config.class_token  # registers stay behind
        x = torch.cat([x[:, :cls], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x, _ = block(x)
        reconstructed = self.decoder_pred(self.decoder_norm(x))[:, cls:]
        return reconstructed, (ids_restore >= self.visible).float()

    def layer_of(self, name: str) -> int:
        """The layer of a parameter, for layer decay: the encoder's, and the decoder on top."""
        return self.encoder.layer_of(name.removeprefix("encoder."))

    def target(self, images: Tensor) -> Tensor:
        """The pixels of each patch (B, N, p*p*c), normalised within the patch (MAE, section 4)."""
        pixels = patchify(images, self.patch)
        if not self.norm_pix_loss:
            return pixels
        mean, deviation = statistics(pixels)
        return (pixels - mean) / deviation


def loss(mae: MAE, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    reconstructed, mask = mae(images)
    error = (reconstructed - mae.target(images)).square().mean(dim=-1)  # (B, N), per patch
    return {"pixels": (error * mask).sum() / mask.sum()}, {}  # masked patches only


def patchify(images: Tensor, patch: int) -> Tensor:
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the pixels of each patch."""
    return pixels.mean(-1, keepdim=True), (pixels.var(-1, keepdim=True) + 1e-6).sqrt()


def sincos(side: int, dim: int) -> Tensor:
    """MAE's fixed positions (1, 1 + side^2, dim): waves of x, then of y; 0 for the class token."""
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width that divides by 4, not {dim}")
    rate = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    y, x = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    angles = [rearrange(axis, "h w -> (h w) 1") * rate for axis in (x, y)]
    grid = torch.cat([wave for a in angles for wave in (a.sin(), a.cos())], dim=1)
    return torch.cat([torch.zeros(1, dim), grid])[None].float()


def build(settings: Settings, dataset: data.Data) -> MAE:
    torch.manual_seed(settings.seed)
    encoder = vit.ViT(replace(families.sizes(settings, dataset), classes=0))
    decoder = settings.decoder_dim, settings.decoder_depth, settings.decoder_heads
    return MAE(encoder, settings.mask_ratio, *decoder, settings.norm_pix_loss)


def export(mae: MAE) -> dict:
    """The encoder alone. MAE calls its last norm `norm`; `fc_norm` precedes a head."""
    weights = {k.replace("fc_norm", "norm"): v for k, v in mae.encoder.state_dict().items()}
    return checkpoints.export(mae.encoder) | {"model": weights}


def task(settings: Settings, dataset: data.Data | None = None) -> train.Task:
    """Everything that train.fit needs. `dataset`: used instead of what the settings name."""
    device = launch.device(settings.device)
    dataset = dataset or data.load(settings, device)
    mae = build(settings, dataset).to(device)
    return train.Task("pretrain", mae, dataset, loss=loss, export=export)


def main(settings: Settings) -> dict | None:
    if settings.reconstruct:
        return show(settings)
    runs.check(settings, "pretrain")
    return train.fit(task(settings), settings)


# Pictures of what it learned ----------------------------------------------------------------------


def trained(settings: Settings, dataset: data.Data) -> MAE:
    """The masked autoencoder of a run, with its decoder. FileNotFoundError if there is no run."""
    last = runs.folder(settings, "pretrain") / "last.pt"
    if not last.is_file():
        raise FileNotFoundError(f"no run at {last}: pre-train first, or say where with --out")
    mae = build(settings, dataset)
    try:
        state = storage.read(last)
        if state["run"]["method"] != "pretrain":
            raise ValueError(f"it is of a run of {state['run']['method']}")
        asked = {k: getattr(settings, k) for k in ("components", "norm_pix_loss", *DECODER)}
        if odd := runs.differences({k: state["run"].get(k) for k in asked}, asked):
            raise ValueError("; ".join(odd))
        mae.load_state_dict(state["net"])
    except Exception as error:  # whatever a file of something else leads to
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise ValueError(f"{last} holds no masked autoencoder of these sizes ({reason})") from error
    return mae.eval()


def show(settings: Settings) -> None:
    launch.one_process()
    picture = Path(settings.reconstruct)
    storage.check_place(picture, "--reconstruct", ".png", ".jpg", ".jpeg", ".pdf", ".svg")
    device = launch.device(settings.device)
    dataset = data.load(settings, device)
    mae = trained(settings, dataset).to(device)
    figure = reconstruct(mae, next(dataset.val.in_order(8))[0], dataset.normalization)
    picture.parent.mkdir(parents=True, exist_ok=True)
    pictures.save(figure, picture)
    launch.print0(f"{runs.folder(settings, 'pretrain')}: wrote {picture}")


@torch.no_grad()
def reconstruct(mae: MAE, images: Tensor, normalization: Normalization):
    """A matplotlib figure: images, what the encoder sees of them, what the decoder makes of it."""
    patches, mask = mae(images)
    if mae.norm_pix_loss:  # the decoder does not know a patch's mean and deviation: the original's
        mean, deviation = statistics(patchify(images, mae.patch))
        patches = patches * deviation + mean
    fold = dict(h=round(mae.patches**0.5), p=mae.patch, q=mae.patch)
    patches = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", **fold)
    masked = repeat(mask, "b (h w) -> b 1 (h p) (w q)", **fold)
    original, guess = (to_pixels(x, normalization) for x in (images, patches))
    rows = {
        "original": original,
        "visible": original * (1 - masked) + 0.6 * masked,
        "reconstructed": original * (1 - masked) + guess * masked,
    }
    figure, axes = pictures.figure(3, len(images), len(images), 3.2, squeeze=False)
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, row.cpu(), strict=True):
            axis.imshow(rearrange(picture, "c h w -> h w c").expand(-1, -1, 3).numpy())
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    return figure


if __name__ == "__main__":
    launch.run(main, parse)
