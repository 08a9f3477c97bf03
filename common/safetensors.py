"""Reads safetensors files, as timm publishes them: a length, a header in JSON, raw tensors."""

import json
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name. An error if header and bytes do not fit together."""
    size, found = path.stat().st_size, {}
    whole = torch.from_file(str(path), size=size, dtype=torch.uint8)  # mapped, not in memory
    begin = 8 + int.from_bytes(whole[:8].numpy(), "little")
    header = json.loads(whole[8:begin].numpy().tobytes())
    header.pop("__metadata__", None)
    spans = sorted(about["data_offsets"] for about in header.values())
    edges = [0, *chain(*spans), size - begin]
    if edges[::2] != edges[1::2]:  # each tensor must begin where another one ends
        raise ValueError("its tensors overlap, or some of its bytes belong to none")
    for name, about in header.items():
        first, last = about["data_offsets"]
        part = whole[begin + first : begin + last].clone()  # aligned, and in memory
        found[name] = part.view(DTYPES[about["dtype"]]).view(about["shape"])
    return found
