"""Reads safetensors files, as timm publishes them: a length, a header in JSON, raw tensors."""

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


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, by name. ValueError if header and bytes do not fit together."""
    with open(path, "rb") as file:  # mapped, so that nothing is in memory twice
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    begin = 8 + int.from_bytes(whole[:8], "little")
    header, end, found = json.loads(whole[8:begin]), 0, {}
    header.pop("__metadata__", None)
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (first, last) = DTYPES[about["dtype"]], about["shape"], about["data_offsets"]
        count = math.prod(shape)
        if first != end or last - first != count * dtype.itemsize or begin + last > len(whole):
            raise ValueError(f"{name} does not lie where it should ({first} to {last})")
        raw = bytearray(whole[begin + first : begin + last])  # aligned, and alone in memory
        found[name] = torch.frombuffer(raw, dtype=dtype).view(shape) if raw else torch.empty(shape)
        end = last
    if begin + end != len(whole):
        raise ValueError(f"{len(whole) - begin - end} bytes at its end belong to no tensor")
    return found
