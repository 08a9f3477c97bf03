"""The forms of the distillation loss, timed side by side.

python -m speed.loss_forms            milliseconds of one layer of ViT-L
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import recipes
from attention_distill import attention_loss
from common import launch
from common.attention import fused_attention_loss
from common.launch import print0
from common.settings import parse_settings, setting
from speed import measure
from vit import QK


@dataclass(frozen=True)
class Settings(measure.Settings):
    steps: int = setting(20, "timed steps of each form", low=1)


parse = partial(parse_settings, __doc__, Settings, {})
TOKENS = (197, 577, 1025)


def fused(student: QK, teacher: QK) -> Tensor:
    """What training calls."""
    return fused_attention_loss(student.q, student.k, teacher.q, teacher.k)[0]


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


def flexible(student: QK, teacher: QK) -> Tensor:
    """The same, with log(sum(exp)) by flex_attention: no map at all. To be compiled."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    q, k = student.q, student.k
    _, aux = flex_attention(q, k, k, return_aux=AuxRequest(lse=True))
    found = F.scaled_dot_product_attention(teacher.q, teacher.k, k)
    return (aux.lse - q.shape[-1] ** -0.5 * (q * found).float().sum(dim=-1)).mean()


FORMS = {
    "plain": attention_loss,
    "at once": fused,
    "two fused calls": two_fused_calls,
    "log-sum-exp": log_sum_exp,
}


def time_forms(
    forms: dict[str, Callable], tokens: int, images: int, steps: int, device
) -> dict[str, float]:
    """Milliseconds per image of forward and backward pass of each form, for a layer of `large`."""
    on_gpu, heads = device.type == "cuda", recipes.SIZES["large"][2]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    drawn = torch.randn(4, images, heads, tokens, 64, device=device, dtype=dtype)
    q, k, q_t, k_t = (x.clone().requires_grad_(i < 2) for i, x in enumerate(drawn))

    def work(form: Callable) -> None:
        with torch.autocast(device.type, dtype, enabled=on_gpu):
            loss = form(QK(q, k), QK(q_t, k_t))
        torch.autograd.grad(loss, (q, k))

    times = {name: [] for name in forms}
    for step in range(3 + steps):
        for name, form in forms.items():
            took = measure.measure_seconds(partial(work, form), device)
            times[name] += [took] if step >= 3 else []
    return {name: round(1000 * statistics.median(took) / images, 4) for name, took in times.items()}


def can_run(name: str, form: Callable, device) -> bool:
    """Whether a form can be compiled and timed here. If not, a note says why."""
    try:
        return bool(time_forms({name: form}, TOKENS[0], 1, 1, device))
    except (RuntimeError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        print0(f"{name}, left out: {reason}")
        return False


def main(settings: Settings) -> dict:
    """Each form, and on a GPU also compiled."""
    device = launch.get_device(settings.device)
    on_gpu, forms = device.type == "cuda", dict(FORMS)
    if on_gpu:
        forms |= {f"{name}, compiled": torch.compile(form) for name, form in FORMS.items()}
        forms["flex, compiled"] = torch.compile(flexible)
    forms = {name: form for name, form in forms.items() if can_run(name, form, device)}
    table = {name: {} for name in forms}
    for tokens in TOKENS:
        images = (64 if on_gpu else 8) * 197 // tokens
        for name, ms in time_forms(forms, tokens, images, settings.steps, device).items():
            table[name][str(tokens)] = ms
    print0(f"{'ms, one layer':26} " + " ".join(f"{tokens:>6} tokens" for tokens in TOKENS))
    for name, row in table.items():
        print0(f"{name:26} " + " ".join(f"{ms:13.3f}" for ms in row.values()))
    dtype = str(torch.bfloat16 if on_gpu else torch.float32)
    about = {"heads": recipes.SIZES["large"][2], "dtype": dtype, "steps": settings.steps}
    found = {"ms_per_image_and_layer": table} | about
    return measure.add_record(settings, device, "speed.loss_forms", found)


if __name__ == "__main__":
    launch.run(main, parse)
