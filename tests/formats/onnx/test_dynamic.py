"""Dynamic int8: what is made column by column is what quantize_dynamic makes of a whole model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from spp_export.formats.onnx import projection as dynamic
from spp_export.formats.onnx.projection import quantise_dynamic_weight
from spp_export.formats.onnx.quantise import quantiser


def weight(inputs: int, outputs: int) -> np.ndarray:
    rng = np.random.default_rng(outputs)
    scale = rng.uniform(0.1, 2.0, outputs)
    return (rng.standard_normal((inputs, outputs)) * scale).astype(np.float32)


def model(nodes: list[onnx.NodeProto], inputs: int, **constants: np.ndarray) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(made, {"onnx.quant.pre_process": "onnxruntime.quant"})
    return made


def run(made: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def test_the_product_is_that_of_a_model_quantised_whole(tmp_path: Path) -> None:
    given = weight(48, 11)
    x = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    whole = model([helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], 48, w=given)
    quantiser("quantize").quantize_dynamic(whole, tmp_path / "q.onnx", per_channel=True)
    made = quantise_dynamic_weight(given)
    node = helper.make_node
    ours = model(
        [
            node("DynamicQuantizeLinear", ["x"], ["codes", "step", "zero"]),
            node("MatMulInteger", ["codes", "w", "zero"], ["sums"]),
            node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
            node("Mul", ["step", "scales"], ["steps"]),
            node("Mul", ["floats", "steps"], ["y"]),
        ],
        48,
        w=made.weight,
        scales=made.scales,
    )
    np.testing.assert_allclose(
        run(ours, x), run(onnx.load(tmp_path / "q.onnx"), x), rtol=0, atol=1e-5
    )
    # Not what the graph gives: without VNNI, ONNX Runtime's sums of int8 products saturate.
    assert np.abs(x @ (made.weight.astype(np.float32) * made.scales) - x @ given).max() < 0.3


def test_every_column_has_its_own_step() -> None:
    given = weight(16, 9)
    given[:, 4] = 0.0
    made = quantise_dynamic_weight(given)
    assert (made.weight.dtype, made.weight.shape) == (np.dtype(np.int8), (16, 9))
    assert made.scales.shape == (9,)
    steps = np.abs(given).max(axis=0) / 127
    assert (np.abs(made.weight * made.scales - given) <= steps * 0.51).all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = weight(16, 9)
    whole = quantise_dynamic_weight(given)
    monkeypatch.setattr(dynamic, "_CHUNK_VALUES", 16 * 4)
    parts = quantise_dynamic_weight(np.ascontiguousarray(given.T).T)
    np.testing.assert_array_equal(parts.weight, whole.weight)
    np.testing.assert_array_equal(parts.scales, whole.scales)
