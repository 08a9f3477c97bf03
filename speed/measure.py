"""What all measurements share: operations counted, seconds, memory, records."""

import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import recipes
from common import checkpoints, runs
from common.hardware import has_fast_bf16
from common.launch import device_name, print0
from common.settings import Base, parse_layers, setting

CLASSES = {"cifar10": 10, "imagenet": 1000}


@dataclass(frozen=True)
class Settings(Base):
    device: str = setting("auto", "cpu, cuda, mps, or auto")
    record: bool = setting(False, "keep the figures in speed/benchmark-DEVICE.json")


def count_operations(method: str, recipe) -> float:
    """Floating-point operations per image of a training step: those that a method needs.

    A linear layer of I inputs and O outputs costs 2 I O per token. A map costs 2 N^2 D, and so does
    its product with the values. The backward pass costs twice the forward pass, but images need no
    gradient and what is lent has none. A block that copies computes no queries and keys. The
    teacher ends with the queries and keys of the last used layer. Layer norms, softmax, the
    optimizer and recomputation are not counted.
    """
    dim, depth, _ = recipes.SIZES[recipe.model]
    patches = (recipe.image_size // recipe.patch) ** 2
    pixels = recipe.patch**2 * len(recipes.DATA_SETS[recipe.data].mean)
    n, embed = 1 + patches, 2 * patches * pixels * dim
    one_map, queries_keys = 2 * n**2 * dim, 4 * n * dim**2

    def block(tokens: int, d: int) -> float:
        """Forward: qkv, projection and MLP; the map, and its product with the values."""
        return 2 * tokens * d**2 * (3 + 1 + 8) + 4 * tokens**2 * d

    if method == "pretrain":
        visible, d = 1 + int(patches * (1 - recipe.mask_ratio)), recipe.decoder_dim
        ends = 2 * (visible * dim * d + n * d * pixels)
        decoder = recipe.decoder_depth * block(n, d)
        return 2 * embed + 3 * (depth * block(visible, dim) + decoder + ends)
    student = 2 * embed + 3 * (depth * block(n, dim) + 2 * dim * CLASSES[recipe.data])
    if method == "finetune":
        return student
    layers = parse_layers(recipe.layers, depth)
    teacher = embed + layers[-1] * block(n, dim) + queries_keys
    if method == "copy":  # of a copied block: no queries and keys, and no gradient of the map
        return teacher + student - len(layers) * 3 * (queries_keys + one_map)
    return teacher + student + one_map  # the teacher's last map


def measure_seconds(work: Callable, device: torch.device, times: int = 1) -> float:
    """Until the device is done. Of several `times` the median."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def measure_matrix_rate(device: torch.device) -> float:
    """Operations per second of the device's own matrix product, in bf16 or float32, two sizes."""
    sizes = (4096, 8192) if device.type == "cuda" else (1024, 2048)
    dtypes = [torch.float32, torch.bfloat16][: 1 + has_fast_bf16(device.type)]
    rates = []
    for n, dtype in itertools.product(sizes, dtypes):
        multiply = partial(torch.matmul, *torch.randn(2, n, n, device=device).to(dtype))
        rates.append(2 * n**3 / measure_seconds(multiply, device, 12))
    torch.cuda.empty_cache()
    return max(rates)


def read_peak(device: torch.device) -> float:
    """The most memory in GiB that this process has taken so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # Windows has none

    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def add_record(settings, device: torch.device, module: str, found: dict) -> dict:
    """With --record, speed/benchmark-DEVICE.json keeps the newest record of each command."""
    name = device_name(device)
    record = {"command": " ".join(["python -m", module, *sys.argv[1:]])}
    record |= {"commit": runs.read_commit(), "device": name, "torch": torch.__version__}
    record |= {"python": platform.python_version()} | found
    if settings.record:
        kind = name.replace(" ", "-") if device.type == "cuda" else device.type
        path = Path(f"speed/benchmark-{kind}.json")
        before = json.loads(path.read_text()) if path.exists() else []
        kept = [row for row in before if row["command"] != record["command"]]
        path.parent.mkdir(exist_ok=True)
        checkpoints.save(json.dumps([*kept, record], indent=1) + "\n", path)
        print0(f"\nwrote {path}")
    return record
