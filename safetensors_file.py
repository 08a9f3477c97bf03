"""Reads a safetensors file: a length, a header in JSON, raw tensors. Nothing in it can run.

The format: https://github.com/huggingface/safetensors. timm publishes its weights so.
"""

import json
import math
import mmap
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
LONGEST = 100_000_000  # bytes of a header, as the reference reader has it


def begins(path: Path) -> bool:
    """Whether a file begins as these do, whatever it is called: with the header behind 8 bytes."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, by name. ValueError if anything in it does not fit."""
    with open(path, "rb") as file:  # mapped, so that nothing is in memory twice
        empty = not file.read(1)
        whole = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    length = int.from_bytes(whole[:8], "little")
    if len(whole) < 8 or not 2 <= length <= min(LONGEST, len(whole) - 8):
        raise ValueError(f"its header would be {length} bytes long, the file is {len(whole)}")
    header = json.loads(whole[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("its header does not say which tensors there are")
    header.pop("__metadata__", None)
    buffer, end, found = memoryview(whole)[8 + length :], 0, {}
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (first, last) = (about[key] for key in ("dtype", "shape", "data_offsets"))
        if dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{name} is of an unknown kind ({dtype}, {shape})")
        count = math.prod(shape)
        if first != end or last - first != count * DTYPES[dtype].itemsize or last > len(buffer):
            raise ValueError(f"{name} does not lie where it should ({first} to {last})")
        if count:
            flat = torch.frombuffer(buffer, dtype=DTYPES[dtype], count=count, offset=first)
            found[name] = flat.view(shape).clone()  # aligned, and alone in memory
        else:
            found[name] = torch.empty(shape, dtype=DTYPES[dtype])
        end = last
    if end != len(buffer):
        raise ValueError(f"{len(buffer) - end} bytes at its end belong to no tensor")
    return found
