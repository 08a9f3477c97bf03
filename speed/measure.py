"""What all measurements share: operations counted, seconds, memory, records."""

from launch import device_name, print0

import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import data
import families
import runs
import storage
from learner import multiplies_bf16
from lending import parse_layers
from settings import Setting, Settings, Table


def classes_of(settings: Settings) -> int:
    return 1000 if settings.data == "imagenet" else 10


def operations(method: str, settings: Settings) -> float:
    """Floating-point operations per image of a training step: those that a method needs.

    A linear layer of I inputs and O outputs costs 2 I O per token; a map, and what is seen through
    it, 2 N^2 D each; the backward pass costs twice the forward pass, but for the first layer
    (images need no gradient) and what is lent; a block that copies computes no queries and keys;
    the teacher ends with the queries and keys of the last used layer. Layer norms, softmax, the
    optimiser and recomputation are not counted.
    """
    dim, depth, _ = families.size(settings.model)
    kind = data.KINDS[settings.data]
    patches = ((settings.image_size or kind.image_size) // settings.patch) ** 2
    pixels = settings.patch**2 * kind.channels

    def block(tokens: int, d: int = dim) -> float:
        """Forward: qkv, projection, MLP, and what is seen."""
        return 2 * tokens * d * d * (3 + 1 + 8) + 2 * tokens**2 * d

    def one_map(tokens: int, d: int = dim) -> float:
        return 2 * tokens**2 * d

    def train_step(tokens: int, depth: int, d: int = dim) -> float:
        return 3 * depth * (block(tokens, d) + one_map(tokens, d))

    n, embed = 1 + patches, 2 * patches * pixels * dim
    queries_keys = 2 * n * dim * 2 * dim
    if method == "pretrain":
        visible, d = 1 + int(patches * (1 - settings.mask_ratio)), settings.decoder_dim
        ends = 3 * 2 * (visible * dim * d + n * d * pixels)
        return (
            2 * embed + train_step(visible, depth) + train_step(n, settings.decoder_depth, d) + ends
        )
    student = 2 * embed + train_step(n, depth) + 3 * 2 * dim * classes_of(settings)
    if method == "finetune":
        return student
    layers = parse_layers(settings.layers, depth)
    teacher = embed + layers[-1] * (block(n) + one_map(n)) + queries_keys
    if method == "copy":  # of a copied block: no queries and keys, and no gradient of the map
        return teacher + student - len(layers) * 3 * (queries_keys + one_map(n))
    return teacher + student + one_map(n)  # the teacher's last map


def matrix_rate(device: torch.device) -> float:
    """Operations per second of the device's own matrix product, in bf16 or float32, two sizes."""
    best, dtypes = 0.0, [torch.float32]
    if multiplies_bf16(device.type):
        dtypes.append(torch.bfloat16)
    for n in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        for dtype in dtypes:
            a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
            times = [seconds(lambda a=a, b=b: a @ b, device) for _ in range(12)]
            best = max(best, 2 * n**3 / statistics.median(times))
    return best


def seconds(work: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak(device: torch.device) -> float:
    """The most memory in GiB that this process has taken so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


RECORD: Table = {
    "record": Setting(False, "keep the figures in --results/benchmark-DEVICE.json"),
    "results": Setting("results", "where the record goes"),
}


class Records:
    """results/benchmark-DEVICE.json, with --record: a record for each command, its newest."""

    def __init__(self, settings: Settings, device: torch.device):
        self.device = device_name(device)
        name = self.device.replace(" ", "-") if device.type == "cuda" else device.type
        self.path = Path(settings.results) / f"benchmark-{name}.json" if settings.record else None
        self.all = read_records(self.path) if self.path and self.path.exists() else {}
        print0(f"{self.device}, torch {torch.__version__}")

    def add(self, module: str, found: dict) -> dict:
        command = " ".join(["python", "-m", module, *sys.argv[1:]])
        about = {"command": command, "commit": runs.commit(), "device": self.device}
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        record = about | versions | found
        if self.path:
            self.all.pop(command, None)
            self.all[command] = record
            self.path.parent.mkdir(exist_ok=True, parents=True)
            storage.write_text(self.path, json.dumps(list(self.all.values()), indent=1) + "\n")
            print0(f"\nwrote {self.path}")
        return record


def read_records(path: Path) -> dict[str, dict]:
    try:
        return {record["command"]: record for record in json.loads(path.read_text())}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} holds no records of speed measurements: move it away, or choose other "
            "--results"
        ) from error
