from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spp_export.common.errors import CheckpointError
from spp_export.models.checkpoint.header import read_header
from spp_export.models.checkpoint.reader import as_array


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


# What is wrong -> content of the file, and what the message must say.
MALFORMED = {
    "empty": (b"", "too few"),
    "seven bytes": (b"1234567", "too few"),
    "length beyond the file": (file_of({}, length=3), "claims 3 bytes, the file has 10"),
    "length beyond the cap": (file_of({}, length=1 << 62), "at most 16777216"),
    "not UTF-8": (file_of(b"{\xff}"), "UTF-8"),
    "not JSON": (file_of(b"{]"), "not valid JSON"),
    "no object": (file_of([]), "does not start with"),
    "space first": (file_of(b" {}"), "does not start with"),
    "deep": (file_of(b'{"a":' * 5000 + b"1" + b"}" * 5000), "nested deeper"),
    "duplicate name": (
        file_of(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
        "'a' appears twice",
    ),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry is a list": (file_of({"a": []}), "'a': expected dtype"),
    "entry lacks a key": (file_of({"a": {"dtype": "F32", "shape": [1]}}), "'a': expected dtype"),
    "entry has one more key": (file_of({"a": entry(x=1)}, bytes(4)), "'a': expected dtype"),
    "unknown dtype": (file_of({"a": entry("F33")}, bytes(4)), "'a': dtype 'F33' is not known"),
    "dtype is a list": (file_of({"a": entry(["F32"])}, bytes(4)), "'a': dtype must be"),
    "negative size": (file_of({"a": entry(shape=[-1])}, bytes(4)), "'a': shape"),
    "fractional size": (file_of({"a": entry(shape=[1.0])}, bytes(4)), "'a': shape"),
    "boolean size": (file_of({"a": entry(shape=[True])}, bytes(4)), "'a': shape"),
    "huge size": (file_of({"a": entry(shape=[1 << 60, 0])}, bytes(4)), "'a': shape"),
    "huge rank": (file_of({"a": entry(shape=[1] * 9)}, bytes(4)), "'a': shape"),
    "digits without end": (file_of(b'{"a":{"shape":[%b]}}' % (b"9" * 5000)), "header: "),
    "shape against bytes": (file_of({"a": entry(shape=[2])}, bytes(4)), "takes 8 bytes"),
    "begin after end": (file_of({"a": entry(offsets=(4, 0))}, bytes(4)), "'a': data_offsets"),
    "three offsets": (file_of({"a": entry(offsets=(0, 4, 4))}, bytes(4)), "'a': data_offsets"),
    "negative offset": (file_of({"a": entry(offsets=(-4, 0))}, bytes(4)), "'a': data_offsets"),
    "truncated data": (file_of({"a": entry()}, bytes(3)), "the file has"),
    "trailing data": (file_of({"a": entry()}, bytes(5)), "the file has"),
    "hole before": (file_of({"a": entry(offsets=(4, 8))}, bytes(8)), "'a' leaves a hole"),
    "overlap": (
        file_of({"a": entry(offsets=(0, 4)), "b": entry(offsets=(2, 6))}, bytes(6)),
        "'b' overlaps",
    ),
    "same bytes twice": (file_of({"a": entry(), "b": entry()}, bytes(4)), "overlaps"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(tmp_path, case):
    content, message = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    text = str(caught.value)
    assert message in text
    assert "model.safetensors" in text
    assert "\n" not in text


# The format's description forbids a space first; the library is laxer there, and has no such caps.
ACCEPTED_BY_LIBRARY = {"entry has one more key", "huge rank", "space first"}


@pytest.mark.parametrize(
    "case", sorted(MALFORMED.keys() - ACCEPTED_BY_LIBRARY - {"duplicate name"})
)
def test_the_library_refuses_them_too(tmp_path, case):
    path = tmp_path / "model.safetensors"
    path.write_bytes(MALFORMED[case][0])
    with pytest.raises((SafetensorError, OSError, ValueError)):
        safe_open(path, "numpy").keys()


def test_a_name_with_a_newline_stays_on_the_line(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"a\nb" + "c" * 500: entry("F33")}, bytes(4)))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


@pytest.mark.parametrize(
    "name",
    [
        "bool",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "float8_e4m3fn",
    ],
)
def test_reads_what_the_library_writes(tmp_path, name):
    dtype = getattr(torch, name)
    tensors = {
        "matrix": torch.arange(12).reshape(3, 4).to(dtype),
        "vector": torch.arange(5).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "nothing": torch.zeros(0, 3).to(dtype),
        "no columns": torch.zeros(3, 0).to(dtype),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        array = as_array(found[name])
        assert array.shape == tuple(tensor.shape)
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        np.testing.assert_array_equal(array.reshape(-1).view(np.uint8), raw)


def test_padding_and_no_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(b'{"__metadata__":{"format":"pt"}}   '))
    assert read_header(path) == {}


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "none")
