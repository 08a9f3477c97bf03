"""What all measurements share: operations counted, seconds, memory, records."""

import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import recipes
from common import checkpoints, runs
from common.launch import device_name, print0
from common.precision import has_bf16
from common.settings import Base, parse_layers, setting


@dataclass(frozen=True)
class Settings(Base):
    device: str = setting("auto", "cpu, cuda, mps, or auto")
    record: bool = setting(False, "keep the figures in --speed/benchmark-DEVICE.json")
    results: str = setting("speed", "folder of the record")


def count_classes(recipe) -> int:
    return 1000 if recipe.data == "imagenet" else 10


def count_operations(method: str, recipe) -> float:
    """Floating-point operations per image of a training step: those that a method needs.

    A linear layer of I inputs and O outputs costs 2 I O per token. A map costs 2 N^2 D, and so does
    its product with the values. The backward pass costs twice the forward pass, but images need no
    gradient and what is lent has none. A block that copies computes no queries and keys. The
    teacher ends with the queries and keys of the last used layer. Layer norms, softmax, the
    optimizer and recomputation are not counted.
    """
    dim, depth, _ = recipes.SIZES[recipe.model]
    kind = recipes.DATA_SETS[recipe.data]
    patches = ((recipe.image_size or kind.image_size) // recipe.patch) ** 2
    pixels = recipe.patch**2 * kind.channels

    def block(tokens: int, d: int = dim) -> float:
        """Forward: qkv, projection, MLP, and map times values."""
        return 2 * tokens * d * d * (3 + 1 + 8) + 2 * tokens**2 * d

    def one_map(tokens: int, d: int = dim) -> float:
        return 2 * tokens**2 * d

    def train_step(tokens: int, depth: int, d: int = dim) -> float:
        return 3 * depth * (block(tokens, d) + one_map(tokens, d))

    n, embed = 1 + patches, 2 * patches * pixels * dim
    queries_keys = 2 * n * dim * 2 * dim
    if method == "pretrain":
        visible, d = 1 + int(patches * (1 - recipe.mask_ratio)), recipe.decoder_dim
        ends = 3 * 2 * (visible * dim * d + n * d * pixels)
        decoder = train_step(n, recipe.decoder_depth, d)
        return 2 * embed + train_step(visible, depth) + decoder + ends
    student = 2 * embed + train_step(n, depth) + 3 * 2 * dim * count_classes(recipe)
    if method == "finetune":
        return student
    layers = parse_layers(recipe.layers, depth)
    teacher = embed + layers[-1] * (block(n) + one_map(n)) + queries_keys
    if method == "copy":  # of a copied block: no queries and keys, and no gradient of the map
        return teacher + student - len(layers) * 3 * (queries_keys + one_map(n))
    return teacher + student + one_map(n)  # the teacher's last map


def measure_matrix_rate(device: torch.device) -> float:
    """Operations per second of the device's own matrix product, in bf16 or float32, two sizes."""
    best, dtypes = 0.0, [torch.float32]
    if has_bf16(device.type):
        dtypes.append(torch.bfloat16)
    for n in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        for dtype in dtypes:
            a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
            times = [measure_seconds(lambda a=a, b=b: a @ b, device) for _ in range(12)]
            best = max(best, 2 * n**3 / statistics.median(times))
    return best


def measure_seconds(work: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def read_peak(device: torch.device) -> float:
    """The most memory in GiB that this process has taken so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def add_record(settings, device: torch.device, module: str, found: dict, whole=True) -> dict:
    """With --record, speed/benchmark-DEVICE.json keeps the newest record of each command.

    One that is not yet `whole` replaces none that is.
    """
    name, command = device_name(device), " ".join(["python", "-m", module, *sys.argv[1:]])
    unfinished = f"{command} (unfinished)"
    about = {
        "command": command if whole else unfinished,
        "commit": runs.read_commit(),
        "device": name,
    }
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    record = about | versions | found
    if settings.record:
        kind = name.replace(" ", "-") if device.type == "cuda" else device.type
        path = Path(settings.results) / f"benchmark-{kind}.json"
        kept = json.loads(path.read_text()) if path.exists() else []
        replaced = (command, unfinished) if whole else (unfinished,)
        others = [row for row in kept if row["command"] not in replaced]
        path.parent.mkdir(exist_ok=True, parents=True)
        checkpoints.save(json.dumps([*others, record], indent=1) + "\n", path)
        print0(f"\nwrote {path}")
    return record
