"""Norms of a graph: RMS norms and LayerNorms, with or without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spp_export.formats.onnx.names import initializer_name
from spp_export.formats.onnx.options import Precision
from spp_export.formats.onnx.recorder import MICROSOFT, Dimension, Recorder
from spp_export.formats.onnx.weights import table
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.families import Feature


class Norms:
    """Writes the norms of one graph."""

    def __init__(
        self, decoder: Checkpoint, g: Recorder, precision: Precision, epsilon: float, *, fused: bool
    ) -> None:
        """`fused`: where an operator of Microsoft's adds and normalises, it is taken."""
        self._decoder, self._g, self._precision = decoder, g, precision
        self._epsilon = epsilon
        features = decoder.family.features
        self._layer_norm = Feature.LAYER_NORM in features
        self._shifted = Feature.SHIFTED_NORM in features
        self._fused = fused and not self._layer_norm

    def after_adding(
        self,
        stream: Any,
        added: Any,
        module: str,
        name: str,
        shape: Sequence[Dimension],
    ) -> tuple[Any, Any]:
        """The normed stream, and the stream itself, with `added` in it unless that is None."""
        g = self._g
        if added is not None and self._fused:
            normed, _, _, total = g.ops(
                "SkipSimplifiedLayerNormalization",
                [stream, added, self._scale(module, int(shape[-1]))],
                name,
                [(name, shape), ("", None), ("", None), (f"{name}/stream", shape)],
                domain=MICROSOFT,
                epsilon=self._epsilon,
            )
            return normed, total
        if added is not None:
            stream = g.op("Add", [stream, added], f"{name}/stream", shape)
        return self(stream, module, name, shape), stream

    def __call__(self, x: Any, module: str, name: str, shape: Sequence[Dimension]) -> Any:
        """`x` normalised along its last axis, with the weights of a module of the checkpoint; ""
        is a norm without any.

        Weights [H,D] are those of heads, which `shape` [B,S,H,D] has apart.
        """
        g, width = self._g, int(shape[-1])
        weight = self._decoder.tensors.get(f"{module}.weight")
        by_head = weight is not None and len(weight.shape) == 2
        scale = self._scale("" if by_head else module, width)
        inputs = [x, scale]
        bias = self._decoder.tensors.get(f"{module}.bias")
        if bias is not None:
            inputs.append(self._stored(f"{module}.bias"))
        kind = "LayerNormalization" if self._layer_norm else "RMSNormalization"
        plain = f"{name}/plain" if by_head else name
        normed = g.op(kind, inputs, plain, shape, axis=-1, epsilon=self._epsilon)
        if by_head:
            normed = g.op("Mul", [normed, self._stored(f"{module}.weight")], name, shape)
        return normed

    def _scale(self, module: str, width: int) -> Any:
        g = self._g
        if f"{module}.weight" not in self._decoder.tensors:
            return g.numbers(np.ones(width, np.float32), f"ones_{width}")
        weight = self._stored(f"{module}.weight")
        if not self._shifted:
            return weight
        one = g.number(1.0, "one_float")
        return g.op("Add", [weight, one], f"{weight.name}/shifted", [width])

    def _stored(self, tensor: str) -> Any:
        stored = self._decoder.tensors[tensor]
        name = initializer_name(self._decoder.family, tensor)
        return self._g.weight(name, stored.shape, table(stored, self._precision))
