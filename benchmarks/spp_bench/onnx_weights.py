"""Bytes of an ONNX graph's weights, read off the graph: formats differ in their element sizes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from spp_export.formats.onnx.options import require

# Tables of positions, which are no weights: a step reads a row of each.
_TABLES = ("cos_cache", "sin_cache")
# Elements of these are packed two to a byte.
_HALF_BYTE = ("INT4", "UINT4")


@dataclass(frozen=True)
class StoredWeights:
    """Bytes of all weights, and of those that a decode step reads: rows of an embedding, not the
    whole table."""

    total: int
    read: int


def stored_weights(directory: Path) -> StoredWeights:
    """Add up the initialisers of `model.onnx`; their data stay on the disk."""
    graph = require("onnx").load(str(directory / "model.onnx"), load_external_data=False).graph
    users: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, set()).add(node.op_type)
    total = read = 0
    for weight in graph.initializer:
        if weight.name in _TABLES:
            continue
        size = _nbytes(weight.data_type, prod(weight.dims))
        total += size
        if not all(user.startswith("Gather") for user in users.get(weight.name, {"Gather"})):
            read += size
    return StoredWeights(total, read)


def _nbytes(data_type: int, count: int) -> int:
    onnx = require("onnx")
    if onnx.TensorProto.DataType.Name(data_type) in _HALF_BYTE:
        return (count + 1) // 2
    size: int = onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize
    return count * size
