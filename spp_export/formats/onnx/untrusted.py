"""An untrusted graph, checked before anything in it is used."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spp_export.common.errors import CheckpointError
from spp_export.common.json_files import read_bytes
from spp_export.formats.onnx.options import require
from spp_export.formats.onnx.recorder import MICROSOFT
from spp_export.formats.onnx.write import DATA_NAME, GRAPH_NAME
from spp_export.models.checkpoint.reader import model_file

# Weights lie beside it: a layer has some ten kilobytes of nodes, and one for each of its experts.
_MAX_GRAPH_BYTES = 32 << 20
_MAX_RANK = 8
# What spp writes, by domain. Others read files, run code or call graphs of their own.
_PLAIN = (
    *("Add", "And", "Attention", "Cast", "Clip", "Concat", "CumSum", "Div"),
    *("DynamicQuantizeLinear", "Equal", "Exp", "Expand", "Gather", "GatherElements", "Gelu"),
    *("Greater", "LayerNormalization", "LessOrEqual", "Log", "MatMul", "MatMulInteger", "Max"),
    *("Min", "Mul", "NonZero", "Or", "RMSNormalization", "Range", "ReduceLogSumExp", "ReduceSum"),
    *("Relu", "Reshape"),
    *("RotaryEmbedding", "ScatterElements", "Shape", "Sigmoid", "Slice", "Softmax", "Softplus"),
    *("Split", "Squeeze", "Sub", "Tanh", "TopK", "Transpose", "Unsqueeze", "Where"),
)
_CONTRIBUTED = (
    *("GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits", "MoE", "RotaryEmbedding"),
    "SkipSimplifiedLayerNormalization",
)
_OPERATORS: Mapping[str, tuple[str, ...]] = {"": _PLAIN, MICROSOFT: _CONTRIBUTED}
_PLACE = ("location", "offset", "length")
_MAX_DIGITS = 18
# Bytes of the element types that spp writes, by ONNX's name.
_ELEMENT_BYTES: Mapping[str, int] = {
    "FLOAT": 4,
    "FLOAT16": 2,
    "BFLOAT16": 2,
    "UINT8": 1,
    "INT8": 1,
    "INT32": 4,
    "INT64": 8,
}
# Anything else would hold tensors, or graphs with tensors, in a node.
_ATTRIBUTES = ("FLOAT", "INT", "STRING", "FLOATS", "INTS", "STRINGS")


def read_graph(directory: Path) -> Any:
    """The onnx.ModelProto of model.onnx; weights stay on disk, where ONNX may now read them.

    A graph may name any file of the machine as its data, and any place in it. Raises
    CheckpointError where it names other data than all of a tensor in model.onnx_data, or holds
    what spp does not write; UsageError where onnx is not installed.
    """
    onnx = require("onnx")
    path = directory / GRAPH_NAME
    content = read_bytes(
        model_file(directory, GRAPH_NAME),
        what="ONNX graph",
        max_bytes=_MAX_GRAPH_BYTES,
        error=CheckpointError,
    )
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own kinds, of whichever implementation
        raise _refusal(path, "is not ONNX") from error
    graph = model.graph
    if not graph.node:
        raise _refusal(path, "holds no graph")
    if model.functions or model.training_info or graph.sparse_initializer:
        raise _refusal(path, "has functions, training or sparse weights, which spp never writes")
    for node in graph.node:
        _check_node(node, path, onnx.AttributeProto.AttributeType)
    kinds = onnx.TensorProto
    size = None
    for tensor in graph.initializer:
        nbytes = _nbytes(tensor, path, kinds.DataType)
        if tensor.data_location != kinds.EXTERNAL:
            if len(tensor.raw_data) != nbytes:
                raise _refusal(path, f"{_name(tensor)} has not the {nbytes} bytes of its shape")
            continue
        if size is None:
            size = os.stat(model_file(directory, DATA_NAME)).st_size
        _check_place(tensor, path, nbytes, size)
    return model


def _check_node(node: Any, path: Path, kinds: Any) -> None:
    if node.op_type not in _OPERATORS.get(node.domain, ()):
        where = f" of domain {node.domain!r:.60}" if node.domain else ""
        raise _refusal(path, f"has an operator {node.op_type!r:.60}{where}, which spp never uses")
    allowed = [kinds.Value(name) for name in _ATTRIBUTES]
    for attribute in node.attribute:
        if attribute.type not in allowed:
            raise _refusal(
                path, f"node {node.name!r:.60} has {attribute.name!r:.40}, which is no number"
            )


def _nbytes(tensor: Any, path: Path, kinds: Any) -> int:
    widths = {kinds.Value(name): width for name, width in _ELEMENT_BYTES.items()}
    # Before multiplying: a million sides would make a number of a million digits.
    rank = len(tensor.dims)
    if tensor.data_type not in widths or rank > _MAX_RANK or any(d < 0 for d in tensor.dims):
        raise _refusal(path, f"{_name(tensor)} has a type or shape that spp never writes")
    nbytes: int = widths[tensor.data_type] * math.prod(tensor.dims)
    return nbytes


def _check_place(tensor: Any, path: Path, nbytes: int, size: int) -> None:
    """A tensor's `nbytes` bytes are all in the file of `size` bytes."""
    what = _name(tensor)
    entries = [(entry.key, entry.value) for entry in tensor.external_data]
    place = dict(entries)
    if len(place) != len(entries) or not set(place) <= set(_PLACE):
        raise _refusal(path, f"{what} says oddly where its data lies")
    if (location := place.get("location")) != DATA_NAME:
        raise _refusal(path, f"{what} lies in {location!r:.60}, expected {DATA_NAME}")
    offset, length = _count(place.get("offset", "0")), _count(place.get("length", str(nbytes)))
    if offset is None or length != nbytes:
        raise _refusal(path, f"{what} has not the {nbytes} bytes of its shape")
    if offset + nbytes > size:
        data = path.parent / DATA_NAME
        raise _refusal(data, f"has {size} bytes, but {what} ends at {offset + nbytes}")


def _name(tensor: Any) -> str:
    return f"weight {tensor.name!r:.60}"


def _count(text: str) -> int | None:
    """A whole number without a sign."""
    plain = text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS
    return int(text) if plain else None


def _refusal(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: {reason}. It is damaged or hostile; export it again.")
