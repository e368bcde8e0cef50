"""A graph by its own names, and what the tests of families ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from spp_export.formats.onnx.read import GraphWeights
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.checkpoint.reader import read_float

_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Graph:
    """The graph by its own names, without anything of the package around it."""

    def __init__(self, directory: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(directory / "model.onnx", options)
        self._inputs = {value.name: value for value in self._session.get_inputs()}

    def past(self, batch: int) -> dict[str, NDArray[Any]]:
        """A cache without tokens."""
        return {
            name: np.zeros((batch, value.shape[1], 0, value.shape[3]), _NUMPY[value.type])
            for name, value in self._inputs.items()
            if name.startswith("past")
        }

    def run(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], past: Mapping[str, NDArray[Any]]
    ) -> tuple[NDArray[np.float64], dict[str, NDArray[Any]]]:
        """Logits [B,S,V] and the cache with the new tokens."""
        feeds: dict[str, NDArray[Any]] = {"input_ids": ids, "attention_mask": mask, **past}
        if "position_ids" in self._inputs:
            feeds["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        names = [value.name for value in self._session.get_outputs()]
        found = dict(zip(names, self._session.run(None, feeds), strict=True))
        logits = found.pop("logits").astype(np.float64)
        return logits, {
            name.replace("present", "past_key_values"): value for name, value in found.items()
        }


def ids(rows: int, count: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, 97, (rows, count))


def assert_close(found: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    limit = 64 * np.finfo(np.float32).eps * max(1.0, np.abs(expected).max())
    assert np.abs(found - expected).max() <= limit
    assert expected.std() > 1e-3


def assert_prompt_and_steps(
    graph: Graph, tokens: NDArray[np.int64], expected: NDArray[np.float64], prompt: int
) -> None:
    """So many tokens at once, then token by token with the cache."""
    ones = np.ones_like(tokens)
    logits, past = graph.run(tokens[:, :prompt], ones[:, :prompt], graph.past(len(tokens)))
    assert_close(logits, expected[:, :prompt])
    for step in range(prompt, tokens.shape[1]):
        logits, past = graph.run(tokens[:, step : step + 1], ones[:, : step + 1], past)
        assert_close(logits[:, 0], expected[:, step])


def assert_weights_are_read_back(directory: Path, decoder: Checkpoint) -> None:
    weights = GraphWeights(directory, decoder.family, decoder.shape, decoder.layers)
    for spec in weights.specs:
        stored = np.asarray(read_float(decoder.tensors[spec.name]), np.float32)
        assert np.array_equal(weights.read(spec.name), stored), spec.name
