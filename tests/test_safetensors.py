"""Our reader of safetensors against the reference one, and against files that lie."""

import json

import pytest
import torch
from safetensors.torch import save_file

import safetensors_file
import storage


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a.weight": torch.randn(3, 5), "b": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 2).half(),
        "empty": torch.empty(0, 4), "one": torch.tensor(3.5), "index": torch.arange(6).view(2, 3),
        "odd": torch.randn(3).bfloat16(), "double": torch.randn(4).double(),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors", tensors


def test_it_reads_what_the_reference_wrote(file):
    path, tensors = file
    found = safetensors_file.read(path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_it_is_known_by_what_is_in_it(file, tmp_path):
    path, tensors = file
    path.rename(tmp_path / "blob")
    assert storage.read(tmp_path / "blob").keys() == tensors.keys()
    torch.save({"a": torch.ones(2)}, tmp_path / "other")
    assert not safetensors_file.begins(tmp_path / "other")


def rewritten(path, change):
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header, buffer = change(header, whole[8 + length :])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + buffer)


def moved(header, buffer):
    header["a.weight"]["data_offsets"] = [0, 60]
    return header, buffer


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda h, b: (h, b[:-3]), "does not lie where it should"),
        (lambda h, b: (h, b + b"xx"), "belong to no tensor"),
        (moved, "does not lie where it should"),
        (lambda h, b: (h | {"b": h["b"] | {"dtype": "F8"}}, b), "unknown kind"),
        (lambda h, b: (h | {"b": h["b"] | {"shape": [9]}}, b), "does not lie where it should"),
        (lambda h, b: (h | {"b": h["b"] | {"shape": [-7]}}, b), "unknown kind"),
    ],
)
def test_a_file_that_lies_is_refused(file, change, said):
    path, _ = file
    rewritten(path, change)
    with pytest.raises(ValueError, match=said):
        safetensors_file.read(path)


@pytest.mark.parametrize("content", [b"", b"1234567", (2**60).to_bytes(8, "little") + b"{}"])
def test_a_header_longer_than_the_file_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="its header would be"):
        safetensors_file.read(tmp_path / "x")
