"""What layers of every size cost in time on one device, as a table that was measured there.

`spp bench --profile` measures attention blocks of every regular shape and MLP blocks of a grid of
widths; Costs are whole nanoseconds, so that sums of them are exact:
what is rounded off is at most half a nanosecond per block, and no further rounding follows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import AfterValidator, Field, model_validator

from spp_export.common.documents import Document, Rows, printable, validated
from spp_export.common.errors import ProfileError
from spp_export.common.json_files import parse_json, read_bytes
from spp_export.models.shape import LayerShape, ModelShape

SCHEMA_VERSION = 1
MAX_BYTES = 4 << 20
Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")
# The sizes of a model that its blocks' times depend on, as `ModelShape` names them.
SIZES = (
    *("model_type", "num_layers", "hidden_size", "query_heads", "kv_heads", "head_dim"),
    *("channels", "vocab_size", "tied_embeddings", "qkv_bias", "output_bias", "mlp_bias"),
    "qk_norm",
)
NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Seconds of the blocks of one model on one device, for one phase, batch size and context.

    sizes: of the model measured, by the names in `SIZES`. attention: by query heads and KV heads,
    of every regular shape. mlp: by width, ascending to the dense one. rest: of a step outside the
    blocks, which are embedding, final norm and logits. device and dtype are the file's own.
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
        # What a layer does not have takes no time.
        costs = [_nanoseconds(self.attention[shape]) if shape[0] else 0 for shape in counts]
        return np.array(costs, dtype=np.int64).reshape(query.shape)

    def mlp_cost(self, widths: Sequence[int]) -> NDArray[np.int64]:
        """Nanoseconds [W] of an MLP block of each width, never fewer for a wider one; 0 of none.

        Linear between the measured widths, once their times are made monotone (the closest
        ascending ones, least squares); narrower than the narrowest costs as much as that.
        """
        times = ascending(list(self.mlp.values()))
        seconds = np.interp(widths, list(self.mlp), times)
        costs = np.maximum(np.rint(seconds * NANOSECONDS), 1).astype(np.int64)
        return np.where(np.asarray(widths) > 0, costs, 0)

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

    def to_dict(self) -> dict[str, Any]:
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

    def to_dict(self) -> dict[str, Any]:
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


# Nanoseconds of this many seconds, a block of each layer of each model, add up exactly.
_Time = Annotated[float, Field(gt=0, le=1000)]
_Count = Annotated[int, Field(ge=1, le=1 << 24)]
_Heads = Annotated[int, Field(ge=1, le=1 << 12)]
_Line = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(printable)]


class _Sizes(Document):
    name: _Line
    model_type: _Line
    num_layers: Annotated[int, Field(ge=1, le=1 << 10)]
    hidden_size: _Count
    query_heads: _Heads
    kv_heads: _Heads
    head_dim: _Count
    channels: _Count
    vocab_size: _Count
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"has {self.query_heads} query_heads, expected a multiple of its "
                f"{self.kv_heads} kv_heads"
            )
        return self


class _Times(Document):
    seconds: _Time
    p20: _Time
    p80: _Time

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.p20 <= self.seconds <= self.p80:
            raise ValueError(
                f"has seconds {self.seconds}, expected p20 {self.p20} to p80 {self.p80}"
            )
        return self


class _AttentionTimes(_Times):
    query_heads: _Heads
    kv_heads: _Heads


class _MlpTimes(_Times):
    channels: _Count


class LatencyDocument(Document):
    """The file of a latency table."""

    version = SCHEMA_VERSION, "Run 'spp bench --profile' with this version of spp."

    schema_version: int
    model: _Sizes
    phase: Phase
    batch: _Count
    context: _Count
    device: _Line
    dtype: _Line
    attention: Rows[_AttentionTimes]
    mlp: Rows[_MlpTimes]
    rest: _Times
    machine: Any = None
    versions: Any = None
    git: Any = None
    options: Any = None

    @model_validator(mode="after")
    def _check_attention(self) -> Self:
        groups, size = self.model.kv_heads, self.model.query_heads // self.model.kv_heads
        expected = f"each of 1 to {groups} KV heads with 1 to {size} query heads per KV head once"
        shapes = {(kv * heads, kv) for kv in range(1, groups + 1) for heads in range(1, size + 1)}
        for index, row in enumerate(self.attention):
            shape = row.query_heads, row.kv_heads
            if shape not in shapes:
                raise ValueError(
                    f"has attention[{index}] of {row.query_heads} query heads and {row.kv_heads} "
                    f"KV heads, expected {expected}"
                )
            shapes.remove(shape)
        if shapes:
            raise ValueError(f"has {len(self.attention)} shapes in attention, expected {expected}")
        return self

    @model_validator(mode="after")
    def _check_mlp(self) -> Self:
        previous = 0
        for index, row in enumerate(self.mlp):
            if row.channels <= previous:
                raise ValueError(
                    f"has mlp[{index}] of {row.channels} channels after {previous}, expected "
                    "ascending widths"
                )
            previous = row.channels
        if previous != self.model.channels:
            raise ValueError(
                f"has an mlp of at most {previous} channels, expected all {self.model.channels}"
            )
        return self


def read_latency_table(path: str | os.PathLike[str]) -> LatencyTable:
    """The table in a file of at most 4 MiB.

    Raises ProfileError, in one line that names the value: a file that cannot be read, bad JSON,
    another schema version, unknown or missing keys, sizes that are impossible, shapes that are
    missing or no shape of the model, times that are not positive.
    """
    data = read_bytes(path, what="profile", max_bytes=MAX_BYTES, error=ProfileError)
    label = f"profile {os.fspath(path)}"
    value = parse_json(data, what=label, error=ProfileError)
    document = validated(LatencyDocument, value, what=label, error=ProfileError)
    return LatencyTable(
        sha256=hashlib.sha256(data).hexdigest(),
        sizes=document.model.model_dump(exclude={"name"}),
        phase=document.phase,
        batch=document.batch,
        context=document.context,
        device=document.device,
        dtype=document.dtype,
        attention={(row.query_heads, row.kv_heads): row.seconds for row in document.attention},
        mlp={row.channels: row.seconds for row in document.mlp},
        rest=document.rest.seconds,
    )
