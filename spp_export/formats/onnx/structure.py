"""Whether a written graph is, node by node, the one that spp builds for a model.

Logits cannot tell everything: a window is wider than the texts they are compared on, a rotary table
longer, and a quantised graph has no exact logits at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spp_export.formats.onnx.graph import COS_TABLE, SIN_TABLE, build_graph
from spp_export.formats.onnx.options import OnnxOptions, require
from spp_export.formats.onnx.recorder import aliases
from spp_export.formats.onnx.untrusted import read_graph
from spp_export.models.checkpoint.checkpoint import Checkpoint

# PyTorch's sines differ in the last bit from machine to machine, and its frequencies do, which the
# position multiplies.
_LAST_BITS = 8.0


def difference(directory: Path, decoder: Checkpoint, options: OnnxOptions) -> str | None:
    """Where the graph of a directory is another one than that of `decoder`; None where it is not.

    Of weights only types and shapes are compared, so the decoder's need not exist on disk. Raises
    CheckpointError for a graph that cannot be read.
    """
    model, built = read_graph(directory), build_graph(decoder, options)
    if {entry.domain: entry.version for entry in model.opset_import} != built.opset_imports:
        return "the operator sets"
    serde = require("onnx_ir").serde
    graph = model.graph
    for values, expected in (
        (graph.input, built.graph.inputs),
        (graph.output, built.graph.outputs),
    ):
        if list(values) != [serde.serialize_value(value) for value in expected]:
            return "the inputs or outputs"
    nodes = [serde.serialize_node(node) for node in built.graph]
    for node, other in zip(nodes, graph.node, strict=False):
        if node != other:
            return f"node {node.name!r:.60}"
    if len(nodes) != len(graph.node):
        return f"the number of nodes, {len(graph.node)} for {len(nodes)}"
    return _different_initializer(directory, graph.initializer, built, options)


def _different_initializer(
    directory: Path, stored: Any, built: Any, options: OnnxOptions
) -> str | None:
    tensors = {tensor.name: tensor for tensor in stored}
    shown = {value.name: of.name for value, of in aliases(built)}
    expected = built.graph.initializers
    if odd := sorted(tensors.keys() ^ (expected.keys() | shown.keys())):
        return f"the initialisers: {odd[0]!r:.60}"
    for value, of in aliases(built):
        tensor, same = tensors[value.name], tensors[of.name]
        if _kind(tensor) != (int(of.const_value.dtype), value.shape.numpy()) or _bytes(
            tensor
        ) != _bytes(same):
            return f"{value.name}, which shows the bytes of {of.name}"
    for name, value in expected.items():
        constant, tensor = value.const_value, tensors[name]
        if _kind(tensor) != (int(constant.dtype), constant.shape.numpy()):
            return f"type or shape of {name}"
        if not _same_constant(directory, tensor, constant, options):
            return f"the constant {name}"
    return None


def _kind(tensor: Any) -> tuple[int, tuple[int, ...]]:
    return tensor.data_type, tuple(tensor.dims)


def _bytes(tensor: Any) -> tuple[bytes, Mapping[str, str]]:
    """What a tensor holds, and where the rest of it lies."""
    return tensor.raw_data, {entry.key: entry.value for entry in tensor.external_data}


def _same_constant(directory: Path, tensor: Any, constant: Any, options: OnnxOptions) -> bool:
    """Whether a constant has the values it was built with; True for weights."""
    if isinstance(constant, require("onnx_ir").LazyTensor):
        return True
    values = require("onnx").numpy_helper.to_array(tensor, str(directory))
    if not tensor.name.startswith((COS_TABLE, SIN_TABLE)):
        return np.array_equal(values, constant.numpy())
    epsilon = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}[options.precision]
    positions = np.arange(len(values))[:, None]
    room = _LAST_BITS * (epsilon + 2.0**-23 * positions)
    apart = np.abs(values.astype(np.float64) - constant.numpy().astype(np.float64))
    return bool((apart <= room).all())
