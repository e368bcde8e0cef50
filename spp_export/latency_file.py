"""Latency tables as files. They may be written by hand, so every value is checked on reading.

A JSON object; times are seconds, each a record of `seconds` (the median), `p20` and `p80`:

schema_version            1
model                     `name`, and the sizes of `latency.SIZES` as the model has them
phase, batch, context     "decode": one token per sequence after `context` cached ones; "prefill":
                          `context` tokens per sequence
device, dtype             what it ran on, and in which precision
attention                 records with `query_heads` and `kv_heads`: every regular shape, once each
mlp                       records with `channels`: ascending widths, of which the last is the
                          model's
rest                      embedding, final norm and logits
machine, versions, git, options
                          where the figures come from; not interpreted, and may be missing
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from spp_export.common.errors import ProfileError
from spp_export.common.json_files import (
    check_keys,
    decode_utf8,
    json_object,
    parse_json,
    read_bytes,
    shown,
)
from spp_export.planning.latency import COUNTS, PHASES, SIZES, SWITCHES, LatencyTable, Phase

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
