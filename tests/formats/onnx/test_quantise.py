"""Blocks of 4 and 8 bits: what is said of them is what ONNX Runtime computes with them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import onnx
import onnxruntime
from onnx import helper, numpy_helper

from spp_export.formats.onnx import quantise
from spp_export.formats.onnx.quantise import (
    PendingParts,
    Quantised,
    dequantise,
    quantise_weight,
    quantised_attributes,
    quantised_shapes,
)

SHAPES = [(64, 24), (96, 7), (80, 5), (16, 3)]  # whole, odd, broken and less than one block


def weight(inputs: int, outputs: int) -> np.ndarray:
    rng = np.random.default_rng(inputs)
    scale = rng.uniform(0.1, 2.0, outputs)
    return (rng.standard_normal((inputs, outputs)) * scale).astype(np.float32)


def run(op: str, feeds: dict[str, np.ndarray], **attributes: int) -> np.ndarray:
    """One com.microsoft node; the first of `feeds` named x or ids is fed, the others constant."""
    inputs = [name for name in feeds if name in ("x", "ids")]
    graph = helper.make_graph(
        [helper.make_node(op, list(feeds), ["y"], domain="com.microsoft", **attributes)],
        "one",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(feeds[name].dtype), feeds[name].shape
            )
            for name in inputs
        ],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, name) for name, v in feeds.items() if name not in inputs],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {name: feeds[name] for name in inputs})[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_dequantised_is_what_the_node_multiplies_by(inputs: int, outputs: int, bits: int) -> None:
    made = quantise_weight(weight(inputs, outputs), bits)
    feeds = {
        "x": np.eye(inputs, dtype=np.float32),
        "b": made.weight,
        "scales": made.scales,
        "zero_points": made.zero_points,
    }
    exact = {**made.attributes, "accuracy_level": 1}
    np.testing.assert_allclose(
        run("MatMulNBits", feeds, **exact), dequantise(made), rtol=0, atol=1e-6
    )
    rounded = run("MatMulNBits", feeds, **made.attributes)
    np.testing.assert_allclose(rounded, dequantise(made), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [64, 96])
def test_the_same_bytes_are_an_embedding(inputs: int, bits: int) -> None:
    made = quantise_weight(weight(inputs, 40), bits)
    ids = np.array([[0, 39, 5], [6, 6, 1]])
    feeds = {
        "table": made.weight.reshape(quantised_shapes(inputs, 40, bits).table),
        "ids": ids,
        "scales": made.scales,
        "zero_points": made.zero_points,
    }
    size = made.attributes["block_size"]
    rows = run(
        "GatherBlockQuantized", feeds, bits=bits, block_size=size, gather_axis=0, quantize_axis=1
    )
    np.testing.assert_allclose(rows[..., :inputs], dequantise(made).T[ids], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("bits", "block_size"), [(4, 32), (4, 64), (8, 32), (8, 128)])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_shapes_are_known_beforehand(inputs: int, outputs: int, bits: int, block_size: int) -> None:
    made = quantise_weight(weight(inputs, outputs), bits, block_size)
    shapes = quantised_shapes(inputs, outputs, bits, block_size)
    for field in fields(shapes):
        assert getattr(made, field.name).shape == getattr(shapes, field.name)
    assert made.weight.nbytes == np.prod(shapes.table)
    assert made.attributes == quantised_attributes(inputs, outputs, bits, block_size)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_value_is_further_than_one_step(bits: int) -> None:
    given = weight(160, 7)
    given[:64, 0] = 0.75  # a constant block
    given[64:128, 0] = np.linspace(0.5, 1.0, 64)  # a block without zero
    given[:, 1] = 0.0
    made = quantise_weight(given, bits)
    off = np.abs(dequantise(made) - given)
    steps = np.repeat(made.scales, made.attributes["block_size"], axis=1).T[: len(given)]
    assert (off <= np.abs(steps) * 1.001).all()
    assert (off[:, 1] == 0).all()
    assert np.mean(off) < np.mean(np.abs(steps)) / 3


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = weight(80, 11)
    whole = quantise_weight(given, 4)
    monkeypatch.setattr(quantise, "_CHUNK_VALUES", 80 * 3)
    assert_equal(quantise_weight(given, 4), whole)
    monkeypatch.setattr(quantise, "_CHUNK_VALUES", 1)
    assert_equal(quantise_weight(np.ascontiguousarray(given.T).T, 4), whole)


def assert_equal(one: Quantised, other: Quantised) -> None:
    for name in ("weight", "scales", "zero_points"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_a_pending_weight_is_read_once_for_all_its_parts() -> None:
    given, reads = weight(64, 5), []

    def read() -> np.ndarray:
        reads.append(1)
        return given

    pending = PendingParts(lambda: quantise_weight(read(), 4))
    part = {name: pending.part(name) for name in ("weight", "scales", "zero_points")}
    assert not reads
    expected = quantise_weight(given, 4)
    np.testing.assert_array_equal(part["weight"](), expected.weight)
    np.testing.assert_array_equal(part["scales"](), expected.scales)
    np.testing.assert_array_equal(part["zero_points"](), expected.zero_points)
    assert len(reads) == 1
    np.testing.assert_array_equal(part["scales"](), expected.scales)
    assert len(reads) == 2


def test_the_quantiser_keeps_quiet() -> None:
    program = (
        "import logging, numpy as np;"
        "from spp_export.formats.onnx.quantise import quantise_weight;"
        "quantise_weight(np.ones((32, 2), np.float32), 4);"
        "assert not logging.getLogger().handlers"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
