"""Dynamic int8: a weight by ONNX Runtime's own `quantize_dynamic`, one tensor at a time.

Every output's column of a weight [K, N] has one scale; activations are rounded as they come, per
tensor. That function itself holds a whole model several times, and leaves a head that is tied to
its embedding through a Transpose as it is; here it is given one product after the other.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spp_export.formats.onnx.options import require
from spp_export.formats.onnx.quantise import quantiser

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
