"""The forms of the distillation loss, timed side by side.

python -m speed.loss_forms            milliseconds of one layer of ViT-L
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import recipes
from attention_distill import attention_loss
from common import launch
from common.attention import compare_maps
from common.launch import print0
from common.settings import parse_settings
from speed import measure
from vit import QK

parse = partial(parse_settings, __doc__, measure.Settings, {})
TOKENS, HEADS = (197, 577, 1025), recipes.SIZES["large"][2]


def two_fused_calls(student: QK, teacher: QK) -> Tensor:
    """The gradient by two calls of fused attention. Its value is not the loss."""
    q, k = student.q, student.k
    own = F.scaled_dot_product_attention(q.detach(), k.detach(), k)
    gap = own - F.scaled_dot_product_attention(teacher.q, teacher.k, k)
    return q.shape[-1] ** -0.5 * (q * gap).sum(dim=-1).mean()


def log_sum_exp(student: QK, teacher: QK) -> Tensor:
    """log(sum(exp(scores))) minus the mean score under the teacher's map: one map, not two."""
    q, k = student.q * student.q.shape[-1] ** -0.5, student.k
    found = F.scaled_dot_product_attention(teacher.q, teacher.k, k)
    return ((q @ k.mT).float().logsumexp(dim=-1) - (q * found).float().sum(dim=-1)).mean()


FORMS = {
    "plain": attention_loss,
    "at once": lambda ours, theirs: compare_maps(ours, theirs)[0],  # in training
    "two fused calls": two_fused_calls,
    "log-sum-exp": log_sum_exp,
}


def time_form(form: Callable, tokens: int, images: int, device: torch.device, dtype) -> float:
    """Milliseconds per image of the forward and backward pass, for a layer of `large`."""
    drawn = torch.randn(4, images, HEADS, tokens, 64, device=device, dtype=dtype)
    q, k, q_t, k_t = (x.clone().requires_grad_(i < 2) for i, x in enumerate(drawn))

    def work() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is torch.bfloat16):
            loss = form(QK(q, k), QK(q_t, k_t))
        torch.autograd.grad(loss, (q, k))

    measure.measure_seconds(work, device, 3)  # it may have to be compiled
    return round(1000 * measure.measure_seconds(work, device, 20) / images, 4)


def main(settings: measure.Settings) -> dict:
    """Each form, and on a GPU also compiled. One that cannot run here is left out."""
    device, table, forms = launch.get_device(settings.device), {}, dict(FORMS)
    dtype, at_a_time = torch.float32, 8  # images of 197 tokens
    if device.type == "cuda":
        dtype, at_a_time = torch.bfloat16, 64
        for name, form in FORMS.items():  # compiled anew for each size, as in training
            forms[f"{name}, compiled"] = torch.compile(form, dynamic=False)
    for name, form in forms.items():
        try:
            for tokens in TOKENS:
                ms = time_form(form, tokens, at_a_time * 197 // tokens, device, dtype)
                table.setdefault(name, {})[str(tokens)] = ms
                print0(f"{name:26} {tokens:5} tokens {ms:9.4f} ms per image and layer")
        except RuntimeError as error:
            print0(f"{name:26} left out: {str(error).splitlines()[:1]}")
    found = {"ms_per_image_and_layer": table, "heads": HEADS, "dtype": str(dtype)}
    return measure.add_record(settings, device, "speed.loss_forms", found)


if __name__ == "__main__":
    launch.run(main, parse)
