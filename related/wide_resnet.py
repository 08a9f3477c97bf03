"""A wide ResNet that shows its groups' outputs, and a cheap one of the same shape (Moonshine)."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data

MODELS = {  # width and convolutions
    "teacher": (2, "plain"), "small": (1, "plain"), "thin": (0.5, "plain"),
    "bottleneck": (2, "bottleneck"),
}  # fmt: skip


def make_convolution(kind: str, dim_in: int, dim_out: int, stride: int) -> nn.Module:
    """A 3x3 convolution, or a cheap one of the same shape, as Moonshine's authors make it."""
    how = dict(kernel_size=3, stride=stride, padding=1, bias=False)
    if kind == "plain":
        return nn.Conv2d(dim_in, dim_out, **how)
    narrow = dim_out // 2
    down, up = nn.Conv2d(dim_in, narrow, 1, bias=False), nn.Conv2d(narrow, dim_out, 1, bias=False)
    middle = nn.Conv2d(narrow, narrow, **how)
    first, second = (nn.Sequential(nn.BatchNorm2d(narrow), nn.ReLU()) for _ in range(2))
    return nn.Sequential(down, *first, middle, *second, up)


class Block(nn.Module):
    """Twice norm, ReLU, convolution, beside a shortcut (He et al. 2016b)."""

    def __init__(self, kind: str, dim_in: int, dim_out: int, stride: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for dim in (dim_in, dim_out))
        self.first = make_convolution(kind, dim_in, dim_out, stride)
        self.second = make_convolution(kind, dim_out, dim_out, 1)
        self.shortcut = nn.Identity()
        if dim_in != dim_out:
            self.shortcut = nn.Conv2d(dim_in, dim_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](x))
        shortcut = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(y)
        return shortcut + self.second(F.relu(self.norms[1](self.first(y))))


class WideResNet(nn.Module):
    """Three groups of two blocks, at the whole, a half and a quarter of the side: 16 layers.

    Zagoruyko and Komodakis, arXiv 1605.07146.
    """

    def __init__(self, model: str, dataset: data.Data):
        super().__init__()
        for name in ("mean", "std"):  # as vit.ViT, it normalises its images itself
            self.register_buffer(name, torch.tensor(getattr(dataset, name))[:, None, None])
        width, kind = MODELS[model]
        dims = [16, *(int(group * width) for group in (16, 32, 64))]
        self.stem = nn.Conv2d(len(dataset.mean), dims[0], 3, padding=1, bias=False)
        self.groups = nn.ModuleList()
        for i in range(3):
            first = Block(kind, dims[i], dims[i + 1], 2 if i else 1)
            self.groups.append(nn.Sequential(first, Block(kind, dims[i + 1], dims[i + 1], 1)))
        self.norm = nn.BatchNorm2d(dims[-1])
        self.head = nn.Linear(dims[-1], len(dataset.classes))

    def groupwise(self, images: Tensor) -> Iterator[Tensor]:
        """Yields each group's output (B, C, H, W)."""
        x = self.stem((images - self.mean) / self.std)
        for group in self.groups:
            x = group(x)
            yield x

    def classify(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(x)).mean(dim=(2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        *_, x = self.groupwise(images)
        return self.classify(x)
