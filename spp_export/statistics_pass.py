"""Sums that one forward pass leaves of each kind of statistics, and their averages over tokens."""

from __future__ import annotations

from spp_export.activations import (
    MeanSquares,
    Observer,
    SecondMoments,
    StreamSensitivity,
    channel_block,
)
from spp_export.importance.statistics import FloatArray
from spp_export.shape import ModelShape


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
        self._stream = StreamSensitivity(layers, stream)

    @property
    def observers(self) -> tuple[Observer, ...]:
        """What has to look on while the model runs."""
        return self._reads, self._second, self._stream

    def averages(self) -> dict[str, FloatArray]:
        """Per token: `second/l` [n,b,b], `mean/l`, `input_square/l`, and `sensitivity` [L].

        The sums are given up for it, so that a large model's are in memory once.
        """
        tokens = max(self._second.tokens, 1)
        found: dict[str, FloatArray] = {}
        for layer in range(self._layers):
            found[f"second/{layer}"] = self._second.products(layer).div_(tokens).numpy()
            self._second.release(layer)
            found[f"mean/{layer}"] = (self._second.sums[layer] / tokens).numpy()
            found[f"input_square/{layer}"] = (self._reads.sums[layer] / tokens).numpy()
        found["sensitivity"] = (self._stream.sums / tokens).numpy()
        return found
