"""What layers of every size cost in time on one device, as a table that was measured there.

`spp bench --profile` measures attention blocks of every regular shape and MLP blocks of a grid of
widths; `latency_file` reads the file. Costs are whole nanoseconds, so that sums of them are exact:
what is rounded off is at most half a nanosecond per block, and no further rounding follows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spp_export.common.errors import ProfileError
from spp_export.common.json_files import (
    check_keys,
    decode_utf8,
    json_object,
    parse_json,
    read_bytes,
    shown,
)
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


SCHEMA_VERSION = 1


MAX_BYTES = 4 << 20


_REQUIRED = (
    *("schema_version", "model", "phase", "batch", "context", "device", "dtype"),
    *("attention", "mlp", "rest"),
)


_OPTIONAL = ("machine", "versions", "git", "options")


_TIMES = ("seconds", "p20", "p80")


# Nanoseconds of this many seconds, a block of each layer of each model, add up exactly.
_MOST_SECONDS = 1000.0


_MOST = 1 << 24


_MOST_LAYERS = 1 << 10


_MOST_HEADS = 1 << 12


_MOST_TEXT = 100


def read_latency_table(path: str | os.PathLike[str]) -> LatencyTable:
    """The table in a file of at most 4 MiB.

    Raises ProfileError, in one line that names the value: a file that cannot be read, bad JSON,
    another schema version, unknown or missing keys, sizes that are impossible, shapes that are
    missing or no shape of the model, times that are not positive.
    """
    data = read_bytes(path, what="profile", max_bytes=MAX_BYTES, error=ProfileError)
    label = f"profile {os.fspath(path)}"
    text = decode_utf8(data, what=label, error=ProfileError)
    value = parse_json(text, what=label, error=ProfileError)
    try:
        return _table(value, hashlib.sha256(data).hexdigest())
    except _MalformedError as problem:
        raise ProfileError(f"{label}: {problem}") from None


class _MalformedError(ProfileError):
    """A defect that the caller puts the file's name in front of."""


def _table(value: Any, sha256: str) -> LatencyTable:
    document = json_object(value, "the document", _MalformedError)
    version = document.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise _MalformedError(
            f"schema_version is {shown(version)}, expected {SCHEMA_VERSION}. "
            "Run 'spp bench --profile' with this version of spp."
        )
    check_keys(document, _REQUIRED, _OPTIONAL, "the document", _MalformedError)
    sizes = _sizes(document["model"])
    return LatencyTable(
        sha256=sha256,
        sizes=sizes,
        phase=_phase(document["phase"]),
        batch=_count(document["batch"], "batch", _MOST),
        context=_count(document["context"], "context", _MOST),
        device=_text(document["device"], "device"),
        dtype=_text(document["dtype"], "dtype"),
        attention=_attention(document["attention"], sizes["query_heads"], sizes["kv_heads"]),
        mlp=_mlp(document["mlp"], sizes["channels"]),
        rest=_times(json_object(document["rest"], "rest", _MalformedError), (), "rest"),
    )


def _sizes(value: Any) -> dict[str, Any]:
    model = json_object(value, "model", _MalformedError)
    check_keys(model, ("name", *SIZES), (), "model", _MalformedError)
    most = {"num_layers": _MOST_LAYERS, "query_heads": _MOST_HEADS, "kv_heads": _MOST_HEADS}
    sizes: dict[str, Any] = {"model_type": _text(model["model_type"], "model.model_type")}
    _text(model["name"], "model.name")
    for name in COUNTS:
        sizes[name] = _count(model[name], f"model.{name}", most.get(name, _MOST))
    for name in SWITCHES:
        if not isinstance(model[name], bool):
            raise _MalformedError(f"model.{name} is {shown(model[name])}, expected true or false.")
        sizes[name] = model[name]
    if sizes["query_heads"] % sizes["kv_heads"]:
        raise _MalformedError(
            f"model.query_heads is {sizes['query_heads']}, expected a multiple of model.kv_heads "
            f"{sizes['kv_heads']}."
        )
    return sizes


def _attention(value: Any, query_heads: int, kv_heads: int) -> dict[tuple[int, int], float]:
    rows, size = _rows(value, "attention"), query_heads // kv_heads
    if len(rows) != query_heads:
        raise _MalformedError(
            f"attention has {len(rows)} shapes, expected {query_heads}: each of 1 to {kv_heads} KV "
            f"heads with 1 to {size} query heads per KV head."
        )
    found: dict[tuple[int, int], float] = {}
    for index, row in enumerate(rows):
        place = f"attention {index}"
        seconds = _times(row, ("query_heads", "kv_heads"), place)
        groups = _count(row["kv_heads"], f"{place}: kv_heads", kv_heads)
        query = _count(row["query_heads"], f"{place}: query_heads", size * groups)
        if query % groups:
            raise _MalformedError(
                f"{place}: query_heads is {query}, expected a multiple of its kv_heads {groups}."
            )
        if (query, groups) in found:
            raise _MalformedError(f"{place}: {query} query heads of {groups} KV heads come twice.")
        found[query, groups] = seconds
    return found


def _mlp(value: Any, channels: int) -> dict[int, float]:
    found: dict[int, float] = {}
    previous = 0
    for index, row in enumerate(_rows(value, "mlp")):
        place = f"mlp {index}"
        seconds = _times(row, ("channels",), place)
        width = _count(row["channels"], f"{place}: channels", channels)
        if width <= previous:
            raise _MalformedError(
                f"{place}: channels is {width} after {previous}; widths must be ascending."
            )
        found[width] = seconds
        previous = width
    if previous != channels:
        raise _MalformedError(f"mlp ends at {previous} channels, expected all {channels}.")
    return found


def _rows(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise _MalformedError(f"{name} is {shown(value)}, expected a list of records.")
    return [json_object(row, f"{name} {index}", _MalformedError) for index, row in enumerate(value)]


def _times(row: Mapping[str, Any], keys: Sequence[str], place: str) -> float:
    """The median of a record, all of whose times are checked."""
    check_keys(row, (*keys, *_TIMES), (), place, _MalformedError)
    for name in _TIMES:
        time = row[name]
        if type(time) not in (int, float) or not 0 < time <= _MOST_SECONDS:
            raise _MalformedError(
                f"{place}: {name} is {shown(time)}, expected a number above 0 and at most "
                f"{_MOST_SECONDS:g}."
            )
    if not row["p20"] <= row["seconds"] <= row["p80"]:
        raise _MalformedError(
            f"{place}: seconds is {row['seconds']}, expected it between p20 {row['p20']} and p80 "
            f"{row['p80']}."
        )
    return float(row["seconds"])


def _phase(value: Any) -> Phase:
    for phase in PHASES:
        if value == phase:
            return phase
    raise _MalformedError(f"phase is {shown(value)}, expected {' or '.join(PHASES)}.")


def _count(value: Any, name: str, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise _MalformedError(f"{name} is {shown(value)}, expected an integer from 1 to {most}.")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= _MOST_TEXT:
        raise _MalformedError(
            f"{name} is {shown(value)}, expected one line of at most {_MOST_TEXT} characters."
        )
    return value
