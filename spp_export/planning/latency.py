"""What layers of every size cost in time on one device, as a table that was measured there.

`spp bench --profile` measures attention blocks of every regular shape and MLP blocks of a grid of
widths; `latency_file` reads the file. Costs are whole nanoseconds, so that sums of them are exact:
what is rounded off is at most half a nanosecond per block, and no further rounding follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spp_export.common.errors import ProfileError
from spp_export.models.shape import LayerShape, ModelShape

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")
# The sizes of a model that its blocks' times depend on, as `ModelShape` names them.
COUNTS = (
    "num_layers",
    "hidden_size",
    "query_heads",
    "kv_heads",
    "head_dim",
    "channels",
    "vocab_size",
)
SWITCHES = ("tied_embeddings", "qkv_bias", "output_bias", "mlp_bias", "qk_norm")
SIZES = ("model_type", *COUNTS, *SWITCHES)
NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Seconds of the blocks of one model on one device, for one phase, batch size and context.

    sizes: of the model measured, by the names in `SIZES`. attention: by query heads and KV heads,
    of every regular shape. mlp: by width, ascending to the dense one. rest: of a step outside the
    blocks, which are embedding, final norm and logits. device and dtype are the file's own words.
    """

    sha256: str
    sizes: Mapping[str, Any]
    phase: Phase
    batch: int
    context: int
    device: str
    dtype: str
    attention: Mapping[tuple[int, int], float]
    mlp: Mapping[int, float]
    rest: float

    def check_model(self, shape: ModelShape) -> None:
        """ProfileError unless the table is of a model with the sizes of `shape`."""
        for name in SIZES:
            measured, here = self.sizes[name], getattr(shape, name)
            if measured != here:
                raise ProfileError(
                    f"profile: measured for a model with {name} {measured} but this one has "
                    f"{here}. Make a table of this model with 'spp bench --profile'."
                )

    def attention_cost(self, query_heads: ArrayLike, kv_heads: ArrayLike) -> NDArray[np.int64]:
        """Nanoseconds of an attention block of each regular size; the counts are broadcast."""
        query, groups = np.broadcast_arrays(query_heads, kv_heads)
        counts = zip(query.ravel().tolist(), groups.ravel().tolist(), strict=True)
        found = [_nanoseconds(self.attention[shape]) for shape in counts]
        return np.array(found, dtype=np.int64).reshape(query.shape)

    def mlp_cost(self, widths: Sequence[int]) -> NDArray[np.int64]:
        """Nanoseconds [W] of an MLP block of each width, never fewer for a wider one.

        Linear between the measured widths, once their times are made monotone (the closest
        ascending ones, least squares); narrower than the narrowest costs as much as that.
        """
        times = ascending(list(self.mlp.values()))
        seconds = np.interp(widths, list(self.mlp), times)
        return np.maximum(np.rint(seconds * NANOSECONDS), 1).astype(np.int64)

    def block_cost(self, layers: Sequence[LayerShape], units: str) -> int:
        """Nanoseconds of these layers' blocks that hold `units`: heads, channels or both."""
        total = 0
        if units != "channels":
            query = [layer.query_heads for layer in layers]
            groups = [layer.kv_heads for layer in layers]
            total += int(self.attention_cost(query, groups).sum())
        if units != "heads":
            total += int(self.mlp_cost([layer.channels for layer in layers]).sum())
        return total

    def step_cost(self, layers: Sequence[LayerShape]) -> int:
        """Nanoseconds of a whole step of a model with these layers."""
        return _nanoseconds(self.rest) + self.block_cost(layers, "both")

    def fixed_cost(self, shape: ModelShape, units: str) -> int:
        """Nanoseconds of a step that no choice of `units` changes."""
        return self.step_cost(shape.layers) - self.block_cost(shape.layers, units)

    def predict(self, shape: ModelShape, layers: Sequence[LayerShape]) -> PredictedLatency:
        """A step of the dense model and of one with these layers."""
        return PredictedLatency(self, self.step_cost(shape.layers), self.step_cost(layers))

    def as_json(self) -> dict[str, Any]:
        """Which table it is, for plan.json."""
        names = ("sha256", "phase", "batch", "context", "device", "dtype")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class PredictedLatency:
    """Nanoseconds of a step, dense and slim, by a table."""

    table: LatencyTable
    dense: int
    slim: int

    @property
    def speedup(self) -> float:
        """How much faster the slim model is, if the table is right."""
        return self.dense / self.slim

    def as_json(self) -> dict[str, Any]:
        """The record for plan.json."""
        milliseconds = {"dense_ms": self.dense / 1e6, "slim_ms": self.slim / 1e6}
        return {
            **{name: getattr(self.table, name) for name in ("phase", "batch", "context")},
            **milliseconds,
            "speedup": round(self.speedup, 4),
        }


def ascending(numbers: Sequence[float]) -> list[float]:
    """The ascending numbers closest to these by least squares: neighbours that descend are
    replaced by their mean until none do."""
    pools: list[tuple[float, int]] = []
    for number in numbers:
        mean, count = number, 1
        while pools and pools[-1][0] > mean:
            earlier, size = pools.pop()
            mean = (earlier * size + mean * count) / (size + count)
            count += size
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _nanoseconds(seconds: float) -> int:
    """At least one: the knapsack's costs are positive."""
    return max(1, round(seconds * NANOSECONDS))
