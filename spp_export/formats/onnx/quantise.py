"""Weights in blocks of 4 or 8 bits by ONNX Runtime's own quantiser, one tensor at a time.

The form is that of `com.microsoft.MatMulNBits`: along its inputs every output's row is cut into
blocks, the last one filled up with zeros; a block has a scale and a zero point. At 4 bits two
values share a byte, the first one low, and so do the zero points of a row.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spp_export.formats.onnx.options import require

Bits = Literal[4, 8]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Of values with a scale of their own. In 4 bits blocks of 64 were an eighth faster than blocks of
# 32, for a tenth more KL, where the default model was measured; in 8 bits nothing is to be gained.
BLOCK_SIZES: Mapping[Bits, int] = {4: 64, 8: 32}
# Of a weight, by `OnnxOptions.quant`: scales are float32, zero points as wide as the values.
QUANTISED_BYTES = {
    "int4": 0.5 + 4.5 / BLOCK_SIZES[4],
    "int8": 1 + 5 / BLOCK_SIZES[8],
    "int8-dynamic": 1.0,
}
# Activations are cut into the same blocks of int8: several times the speed of keeping them float.
_ACCURACY_LEVEL = 4
# The quantiser holds several copies of what it is given.
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class QuantisedShapes:
    """Shapes of the parts of a `Quantised`; only scales are float."""

    weight: tuple[int, int, int]
    scales: tuple[int, int]
    zero_points: tuple[int, int]

    @property
    def table(self) -> tuple[int, int]:
        """Shape of the same bytes as `weight` that GatherBlockQuantized reads rows from."""
        rows, blocks, size = self.weight
        return rows, blocks * size


@dataclass(frozen=True)
class Quantised:
    """A weight [K, N]: inputs B to zero_points of MatMulNBits, and its attributes.

    weight       [N, blocks, block_size * bits / 8]
    scales       [N, blocks]
    zero_points  [N, blocks * bits / 8 rounded up]
    attributes   K, N, bits, block_size, accuracy_level
    """

    weight: Bytes
    scales: Floats
    zero_points: Bytes
    attributes: Mapping[str, int]


class PendingParts:
    """The constants of a weight, made when the first of them is asked for.

    A part is let go once it is given; asking for it again makes all of them anew.
    """

    def __init__(self, make: Callable[[], object]) -> None:
        self._make = make
        self._made: dict[str, Any] = {}

    def part(self, name: str) -> Callable[[], NDArray[Any]]:
        """Reader of one array by its field's name."""
        return lambda: self._take(name)

    def _take(self, name: str) -> NDArray[Any]:
        if name not in self._made:
            self._made = dict(vars(self._make()))
        part: NDArray[Any] = self._made.pop(name)
        return part


def quantised_attributes(
    inputs: int, outputs: int, bits: Bits, block_size: int | None = None
) -> dict[str, int]:
    """Attributes of the MatMulNBits node of a weight [inputs, outputs]."""
    return {
        "K": inputs,
        "N": outputs,
        "bits": bits,
        "block_size": block_size or BLOCK_SIZES[bits],
        "accuracy_level": _ACCURACY_LEVEL,
    }


def quantised_shapes(
    inputs: int, outputs: int, bits: Bits, block_size: int | None = None
) -> QuantisedShapes:
    """What quantising a weight [inputs, outputs] will give."""
    block_size = block_size or BLOCK_SIZES[bits]
    blocks = -(-inputs // block_size)
    return QuantisedShapes(
        weight=(outputs, blocks, block_size * bits // 8),
        scales=(outputs, blocks),
        zero_points=(outputs, -(-blocks * bits // 8)),
    )


def quantise_weight(weight_KN: Floats, bits: Bits, block_size: int | None = None) -> Quantised:
    """Round a weight [K, N] to the nearest values of its blocks, each with a zero point.

    Raises UsageError where onnxruntime is not installed.
    """
    block_size = block_size or BLOCK_SIZES[bits]
    inputs, outputs = weight_KN.shape
    shapes = quantised_shapes(inputs, outputs, bits, block_size)
    weight = np.empty(shapes.weight, np.uint8)
    scales = np.empty(shapes.scales, np.float32)
    zero_points = np.empty(shapes.zero_points, np.uint8)
    step = max(1, _CHUNK_VALUES // inputs)
    for start in range(0, outputs, step):
        part = slice(start, start + step)
        weight[part], scales[part], zero_points[part] = _quantise_columns(
            weight_KN[:, part], bits, block_size
        )
    attributes = quantised_attributes(inputs, outputs, bits, block_size)
    return Quantised(weight, scales, zero_points, attributes)


def dequantise(quantised: Quantised) -> Floats:
    """The weight [K, N] that the node multiplies by."""
    inputs, bits = quantised.attributes["K"], quantised.attributes["bits"]
    outputs, blocks = quantised.scales.shape
    codes = _unpacked(quantised.weight, bits)
    zeros = _unpacked(quantised.zero_points, bits)[:, :blocks, None]
    values = (codes.astype(np.float32) - zeros) * quantised.scales[:, :, None]
    return values.reshape(outputs, -1)[:, :inputs].T


def _unpacked(data: Bytes, bits: int) -> Bytes:
    """One value per byte."""
    if bits == 8:
        return data
    pairs: Bytes = np.stack([data & 15, data >> 4], axis=-1)
    return pairs.reshape(*data.shape[:-1], -1)


def _quantise_columns(
    columns_KN: Floats, bits: Bits, block_size: int
) -> tuple[Bytes, Floats, Bytes]:
    """Weight, scales and zero points of some outputs, from a model of one product."""
    onnx = require("onnx")
    ort = quantiser("matmul_nbits_quantizer")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    info = helper.make_tensor_value_info
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"], name="product")],
        "product",
        [info("x", kind, [None, columns_KN.shape[0]])],
        [info("y", kind, [None, columns_KN.shape[1]])],
        [numpy_helper.from_array(np.ascontiguousarray(columns_KN), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    config = ort.DefaultWeightOnlyQuantConfig(block_size=block_size, bits=bits)
    run = ort.MatMulNBitsQuantizer(model, algo_config=config)
    run.process()
    made = run.model.model.graph
    (node,) = made.node
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.initializer}
    weight, scales, zero_points = (arrays[name] for name in node.input[1:])
    return weight, scales, zero_points


def quantiser(module: str) -> ModuleType:
    """A module of onnxruntime.quantization, whose import sets up logging for the whole process.

    What it set is undone. Raises UsageError where onnxruntime is not installed.
    """
    require("onnxruntime")
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        return importlib.import_module(f"onnxruntime.quantization.{module}")
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
