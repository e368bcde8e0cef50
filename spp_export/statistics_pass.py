"""Sums that one forward pass leaves of each kind of statistics, and their averages over tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from spp_export.calibration.activations import (
    MeanSquares,
    Observer,
    SecondMoments,
    StreamSensitivity,
    channel_block,
)
from spp_export.calibration.statistics import FloatArray
from spp_export.models.shape import ModelShape


class BlockSums:
    """Observers of an attention block or of an MLP: what it reads, what its output projection
    reads, and the stream after it. `kind` is "attention" or "mlp"."""

    def __init__(self, kind: str, shape: ModelShape) -> None:
        layers = shape.num_layers
        reads, consumes, stream = {
            "attention": ("attention_input", "output", "residual"),
            "mlp": ("mlp_input", "down", "stream"),
        }[kind]
        width, block = {
            "attention": (shape.query_heads * shape.head_dim, None),
            "mlp": (shape.channels, channel_block(shape.channels)),
        }[kind]
        self._layers = layers
        self._reads = MeanSquares(reads, layers, shape.hidden_size)
        self._second = SecondMoments(layers, width, place=consumes, block=block)
        self._block = block or width
        self._widths = shape.hidden_size, width
        self._stream = StreamSensitivity(layers, stream)

    @property
    def observers(self) -> tuple[Observer, ...]:
        """What has to look on while the model runs."""
        return self._reads, self._second, self._stream

    @property
    def sizes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of each of the averages: of every layer's, and of `sensitivity`."""
        single, (read, width) = np.dtype(np.float32), self._widths
        found: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "sensitivity": (np.dtype(np.float64), (self._layers,))
        }
        for layer in range(self._layers):
            count = -(-width // self._block)
            found[f"second/{layer}"] = single, (count, self._block, self._block)
            found[f"mean/{layer}"] = single, (width,)
            found[f"input_square/{layer}"] = single, (read,)
        return found

    def averages(self, layer: int) -> dict[str, FloatArray]:
        """One layer's, per token: `second/l` [n,b,b], `mean/l`, `input_square/l`; and with the last
        layer `sensitivity` [L].

        The layer's sums are given up for it, so that a large model's are not in memory together.
        """
        tokens = max(self._second.tokens, 1)
        found: dict[str, FloatArray] = {
            f"second/{layer}": self._second.products(layer).div_(tokens).numpy(),
            f"mean/{layer}": (self._second.sums[layer] / tokens).numpy(),
            f"input_square/{layer}": (self._reads.sums[layer] / tokens).numpy(),
        }
        self._second.release(layer)
        if layer == self._layers - 1:
            found["sensitivity"] = (self._stream.sums / tokens).numpy()
        return found
