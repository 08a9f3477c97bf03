"""Today's code against numbers of an earlier version of it (7f703f8), kept in golden.json.

Each tensor is known by its norm and by its product with a random vector.
"""

import json
from pathlib import Path

import pytest
import torch

import attention_copy
import attention_distill
import finetune
import pretrain
import vit

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
SHAPE = dict(image_size=12, patch=3, channels=1, depth=4, heads=4)
DISTILL = attention_distill.Settings(smoothing=0.1, attention_weight=3.0)
MAE = dict(mask_ratio=0.6, decoder_dim=16, decoder_depth=1, decoder_heads=2, norm_pix_loss=True)


def make(seed, dim=32, classes=0, drop_path=0.0):
    return fill(vit.ViT(vit.Config(**SHAPE, classes=classes, dim=dim), drop_path), seed)


def fill(net, seed):
    """Weights in float64 that depend on their names' order alone, not on how a net is made."""
    draws, state = torch.Generator().manual_seed(seed), {}
    for name, value in sorted(net.state_dict().items()):
        small = value.ndim < 2 or "token" in name or "pos" in name
        scale = 0.02 if small else 2 * value[0].numel() ** -0.5
        state[name] = scale * torch.randn(value.shape, generator=draws, dtype=torch.float64)
        state[name] += "norm" in name and name.endswith("weight")
    net.double().load_state_dict(state)
    return net


def assert_same(tensors, expected, tolerance):
    assert expected.keys() <= tensors.keys()
    for name, before in expected.items():
        x = tensors[name].double().flatten()
        draws = torch.Generator().manual_seed(len(x))
        product = x @ torch.randn(len(x), generator=draws, dtype=torch.float64)
        close = pytest.approx(before, rel=tolerance, abs=tolerance * before[0])
        assert [x.norm().item(), product.item()] == close, name


def draw_batch():
    draws = torch.Generator().manual_seed(3)
    images = torch.randn(5, 1, 12, 12, generator=draws, dtype=torch.float64)
    return images, torch.tensor([1, 4, 0, 9, 4])


@pytest.mark.parametrize("name, layers", [
    ("finetune", ()), ("copy [0, 1, 2, 3]", (0, 1, 2, 3)), ("distill [0, 1, 2, 3]", (0, 1, 2, 3)),
    ("copy [0, 2]", (0, 2)), ("copy, drop path", (0, 1, 2, 3)), ("distill, drop path", (0, 1, 2)),
    ("distill [0, 1, 2]", (0, 1, 2)), ("distill [1, 3]", (1, 3)), ("pretrain", ()),
])  # fmt: skip
def test_loss_terms_and_gradients_at_fixed_weights(name, layers):
    net, batch = make(1, classes=10, drop_path=0.5 if "drop" in name else 0.0), draw_batch()
    teacher = make(2, dim=48).eval().requires_grad_(False)
    if name == "pretrain":
        net = fill(pretrain.MAE(make(0), pretrain.Settings(**MAE)), 4)
    torch.manual_seed(7)  # drop path, and MAE's masks
    loss, shown = {
        "finetune": lambda: finetune.loss(net, *batch, smoothing=0.1),
        "copy": lambda: attention_copy.loss(net, *batch, teacher, layers, smoothing=0.1),
        "distill": lambda: attention_distill.loss(net, *batch, teacher, layers, DISTILL),
        "pretrain": lambda: pretrain.loss(net, *batch),
    }[name.split()[0].strip(",")]()
    loss.backward()
    terms = {key: value.item() for key, value in {"loss": loss, **shown}.items()}
    assert terms == pytest.approx(GOLDEN[name]["terms"], rel=1e-6)
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert grads.keys() == GOLDEN[name]["gradients"].keys()
    assert_same(grads, GOLDEN[name]["gradients"], 1e-6)
