"""Matrix products with a checkpoint's weights: in full precision, or quantised in blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spp_export.formats.onnx.options import OnnxOptions, require
from spp_export.formats.onnx.quantise import (
    BLOCK_SIZES,
    Bits,
    PendingParts,
    quantise_weight,
    quantised_attributes,
    quantised_shapes,
    quantiser,
)
from spp_export.formats.onnx.recorder import BATCH, MICROSOFT, SEQUENCE, Recorder
from spp_export.formats.onnx.weights import Array, Part, matrix, rounded, table, vector
from spp_export.models.checkpoint.header import StoredTensor

EMBEDDING = "embed_tokens"
_Way = Bits | Literal["dynamic"] | None


@dataclass(frozen=True)
class _Scheme:
    """How each kind of product is made: bits of MatMulNBits, "dynamic", or None for full precision.

    `head` is the language model head, and the embedding it is tied to; `down` is down_proj.
    """

    other: _Way
    head: _Way
    down: _Way


# Where measured: a head in 4 bits adds a third to the KL and is no faster than one in 8 bits;
# down_proj's inputs have channels far above the others, which one scale for all of them drowns.
_SCHEMES: Mapping[str | None, _Scheme] = {
    None: _Scheme(None, None, None),
    "int8": _Scheme(8, 8, 8),
    "int4": _Scheme(4, 8, 4),
    "int8-dynamic": _Scheme("dynamic", "dynamic", 8),
}


class Projections:
    """Writes the products of one graph."""

    def __init__(self, g: Recorder, options: OnnxOptions) -> None:
        self._g, self._precision = g, options.precision
        self._scheme = _SCHEMES[options.quant]
        # Activations that were quantised already: gate and up read the same ones.
        self._quantised_inputs: dict[str, tuple[Any, Any, Any]] = {}

    def linear(self, x: Any, weights: Sequence[Part], biases: Sequence[Part], name: str) -> Any:
        """`x` times weights [out_i, in] side by side, plus biases: [B, S, sum out_i]."""
        g, precision = self._g, self._precision
        width, depth = sum(weight.outputs for weight in weights), weights[0].inputs
        shape: list[int | str] = [BATCH, SEQUENCE, width]
        way = self._way(name)
        if way is None:
            weight = g.weight(f"{name}.weight", [depth, width], matrix(weights, precision))
            product = g.op("MatMul", [x, weight], name, shape)
        elif way == "dynamic":
            product = self._dynamic(x, matrix(weights, "fp32"), depth, width, name)
        else:
            parts = self._quantised(matrix(weights, "fp32"), depth, width, way, name)
            product = self._blocks(x, parts, depth, width, way, name)
        if not biases:
            return product
        bias = g.weight(f"{name}.bias", [width], vector(biases, precision))
        return g.op("Add", [product, bias], f"{name}/biased", shape)

    def embed(self, ids: Any, embedding: StoredTensor, *, tied: bool) -> Any:
        """Rows of the embedding [V, d]: [B, S, d]. Quantised only where the head reads it too: rows
        alone cost nothing to read."""
        g, (_, width) = self._g, embedding.shape
        shape: list[int | str] = [BATCH, SEQUENCE, width]
        way = self._scheme.head if tied else None
        if way is None:
            return g.op("Gather", [self._embedding(embedding), ids], EMBEDDING, shape)
        if way == "dynamic":
            return self._dynamic_rows(ids, embedding)
        return self._quantised_rows(ids, embedding, way)

    def tied_head(self, x: Any, embedding: StoredTensor) -> Any:
        """`x` times the embedding itself: [B, S, V]."""
        g, (rows, width), way = self._g, embedding.shape, self._scheme.head
        if way == "dynamic":
            read = matrix([Part(embedding)], "fp32")
            return self._dynamic(x, read, width, rows, EMBEDDING, output="lm_head")
        if way is not None:
            parts = self._quantised_embedding(embedding, way)
            return self._blocks(x, parts, width, rows, way, "lm_head")
        turned = g.op(
            "Transpose",
            [self._embedding(embedding)],
            "lm_head/turned",
            [width, rows],
            perm=[1, 0],
        )
        return g.op("MatMul", [x, turned], "lm_head", [BATCH, SEQUENCE, rows])

    def _way(self, name: str) -> _Way:
        if name == "lm_head":
            return self._scheme.head
        return self._scheme.down if name.endswith(".down_proj") else self._scheme.other

    def _embedding(self, embedding: StoredTensor) -> Any:
        return self._g.weight(
            f"{EMBEDDING}.weight", embedding.shape, table(embedding, self._precision)
        )

    def _quantised_embedding(self, embedding: StoredTensor, bits: Bits) -> Sequence[Any]:
        rows, width = embedding.shape
        return self._quantised(matrix([Part(embedding)], "fp32"), width, rows, bits, EMBEDDING)

    def _quantised_rows(self, ids: Any, embedding: StoredTensor, bits: Bits) -> Any:
        """Rows out of the head's own blocks."""
        g, (rows, width) = self._g, embedding.shape
        data, scales, zeros = self._quantised_embedding(embedding, bits)
        sizes, block_size = quantised_shapes(width, rows, bits), BLOCK_SIZES[bits]
        embedded = g.op(
            "GatherBlockQuantized",
            [g.alias(f"{EMBEDDING}.table", data, sizes.table), ids, scales, zeros],
            EMBEDDING,
            [BATCH, SEQUENCE, sizes.scales[1] * block_size],
            domain=MICROSOFT,
            bits=bits,
            block_size=block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        if width % block_size == 0:
            return embedded
        bounds = [
            g.constant([value], f"{EMBEDDING}/{name}")
            for name, value in (("start", 0), ("end", width), ("axis", 2))
        ]
        return g.op("Slice", [embedded, *bounds], f"{EMBEDDING}/cut", [BATCH, SEQUENCE, width])

    def _blocks(
        self, x: Any, parts: Sequence[Any], depth: int, width: int, bits: Bits, name: str
    ) -> Any:
        attributes: dict[str, Any] = quantised_attributes(depth, width, bits)
        shape: list[int | str] = [BATCH, SEQUENCE, width]
        return self._g.op("MatMulNBits", [x, *parts], name, shape, domain=MICROSOFT, **attributes)

    def _quantised(
        self, read: Callable[[], Array], depth: int, width: int, bits: Bits, name: str
    ) -> Sequence[Any]:
        """Data, scales and zero points of a weight [depth, width]."""
        g, pending = self._g, PendingParts(lambda: quantise_weight(read(), bits))
        scales, zeros = pending.part("scales"), pending.part("zero_points")
        sizes = quantised_shapes(depth, width, bits)
        return (
            g.weight(f"{name}.quantised", sizes.weight, pending.part("weight"), "UINT8"),
            g.weight(f"{name}.scales", sizes.scales, lambda: rounded(scales(), self._precision)),
            g.weight(f"{name}.zero_points", sizes.zero_points, zeros, "UINT8"),
        )

    def _per_channel(
        self, read: Callable[[], Array], depth: int, width: int, name: str
    ) -> tuple[Any, Any]:
        """Data [depth, width] and scales [width] of a weight."""
        pending = PendingParts(lambda: quantise_dynamic_weight(read()))
        return (
            self._g.weight(f"{name}.int8", [depth, width], pending.part("weight"), "INT8"),
            self._g.weight(f"{name}.scales", [width], pending.part("scales")),
        )

    def _dynamic(
        self,
        x: Any,
        read: Callable[[], Array],
        depth: int,
        width: int,
        name: str,
        output: str | None = None,
    ) -> Any:
        """A product of integers: activations get their scale and zero point when they are known."""
        g, output = self._g, output or name
        weight, scales = self._per_channel(read, depth, width, name)
        shape: list[int | str] = [BATCH, SEQUENCE, width]
        codes, scale, zero = self._quantised_input(x, depth)
        product = g.op(
            "MatMulInteger", [codes, weight, zero], f"{output}/int32", shape, dtype="INT32"
        )
        real = g.op("Cast", [product], f"{output}/float", shape, to=_FLOAT)
        both = g.op("Mul", [scales, scale], f"{output}/scales", [width])
        return g.op("Mul", [real, both], output, shape)

    def _quantised_input(self, x: Any, depth: int) -> tuple[Any, Any, Any]:
        if x.name not in self._quantised_inputs:
            # The embedding has a scale of its own.
            name = f"{x.name}/input" if x.name == EMBEDDING else x.name
            codes, scale, zero = self._g.mixed(
                "DynamicQuantizeLinear",
                [x],
                f"{name}/quantised",
                [
                    (f"{name}/codes", "UINT8", [BATCH, SEQUENCE, depth]),
                    (f"{name}/scale", "FLOAT", []),
                    (f"{name}/zero", "UINT8", []),
                ],
            )
            self._quantised_inputs[x.name] = (codes, scale, zero)
        return self._quantised_inputs[x.name]

    def _dynamic_rows(self, ids: Any, embedding: StoredTensor) -> Any:
        """Rows out of the head's own integers [d, V]."""
        g, (rows, width) = self._g, embedding.shape
        read = matrix([Part(embedding)], "fp32")
        weight, scales = self._per_channel(read, width, rows, EMBEDDING)
        columns: list[int | str] = [width, BATCH, SEQUENCE]
        shape: list[int | str] = [BATCH, SEQUENCE, width]
        gathered = g.op(
            "Gather", [weight, ids], f"{EMBEDDING}/columns", columns, dtype="INT8", axis=1
        )
        turned = g.op(
            "Transpose", [gathered], f"{EMBEDDING}/rows", shape, dtype="INT8", perm=[1, 2, 0]
        )
        real = g.op("Cast", [turned], f"{EMBEDDING}/float", shape, to=_FLOAT)
        scale = g.op("Gather", [scales, ids], f"{EMBEDDING}/scale", [BATCH, SEQUENCE])
        last = g.constant([-1], "last_axis")
        wide = g.op("Unsqueeze", [scale, last], f"{EMBEDDING}/scale_column", [BATCH, SEQUENCE, 1])
        return g.op("Mul", [real, wide], EMBEDDING, shape)


# onnx.TensorProto's number of float32, for Cast.
_FLOAT = 1


Floats = NDArray[np.float32]


Int8 = NDArray[np.int8]


# The quantiser holds, and writes to temporary files, several copies of what it is given.
_CHUNK_VALUES = 1 << 24


@dataclass(frozen=True)
class DynamicWeight:
    """Constants of one product by MatMulInteger; values are rounded symmetrically around zero.

    weight  [K, N]
    scales  [N]
    """

    weight: Int8
    scales: Floats


def quantise_dynamic_weight(weight_KN: Floats) -> DynamicWeight:
    """Round every column of a weight [K, N] to int8.

    Raises UsageError where onnxruntime is not installed.
    """
    inputs, outputs = weight_KN.shape
    weight, scales = np.empty((inputs, outputs), np.int8), np.empty(outputs, np.float32)
    step = max(1, _CHUNK_VALUES // inputs)
    for start in range(0, outputs, step):
        part = slice(start, start + step)
        weight[:, part], scales[part] = _quantise_columns(weight_KN[:, part])
    return DynamicWeight(weight, scales)


def _quantise_columns(columns_KN: Floats) -> tuple[Int8, Floats]:
    onnx = require("onnx")
    quantize_dynamic = quantiser("quantize").quantize_dynamic
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
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    # Said so, it does not ask for it.
    helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    # It only writes files; this one has no name, and so goes with its process, however that ends.
    with tempfile.TemporaryFile() as file:
        out = Path(f"/proc/self/fd/{file.fileno()}")
        quantize_dynamic(model, out, per_channel=True)
        made = onnx.load(out).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.initializer}
    (product,) = (node for node in made.node if node.op_type == "MatMulInteger")
    name = product.input[1]
    zeros = arrays[product.input[3]]
    assert not zeros.any(), "int8 weights are symmetric"
    (scales,) = (a for n, a in arrays.items() if n not in (name, product.input[3]))
    return arrays[name], scales
