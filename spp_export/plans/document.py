"""plan.json in and out. A plan may be written by hand, so every value is checked on reading."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from spp_export.errors import OutputError, PlanError
from spp_export.jsonio import MAX_JSON_BYTES, decode_utf8, parse_json, read_bytes
from spp_export.plans.records import (
    COMPENSATIONS,
    LAYOUTS,
    PROVENANCE,
    SCHEMA_VERSION,
    LayerPlan,
    Plan,
)

_REQUIRED = ("schema_version", "model", "layout", "compensation", "layers")
_LAYER_KEYS = ("kv_heads", "query_heads", "channels")
Word = TypeVar("Word", bound=str)


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file of at most 16 MiB; PlanError names what is wrong with it."""
    data = read_bytes(path, what="plan", max_bytes=MAX_JSON_BYTES, error=PlanError)
    label = f"plan {os.fspath(path)}"
    return parse_plan(decode_utf8(data, what=label, error=PlanError), what=label)


def parse_plan(text: str, *, what: str = "plan") -> Plan:
    """The plan in a JSON text. `validate_plan` then compares it with a model.

    Raises PlanError, in one line that starts with `what` and names the layer and value: bad JSON,
    another schema version, unknown or missing keys, indices that are not ascending integers.
    """
    value = parse_json(text, what=what, error=PlanError)
    try:
        return _plan(value)
    except _MalformedError as problem:
        raise PlanError(f"{what}: {problem}") from None


def write_plan(plan: Plan, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write plan.json atomically; OutputError where it exists (without `force`) or cannot be."""
    check_plan_target(path, force)
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "x", encoding="utf-8") as file:
            file.write(plan.to_json())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as problem:
        raise OutputError(f"{target}: cannot be written ({problem.strerror}).") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def check_plan_target(path: str | os.PathLike[str], force: bool) -> None:
    """OutputError where `write_plan` would refuse `path`, before any work is done."""
    if not force and os.path.lexists(path):
        raise OutputError(f"{os.fspath(path)}: already exists. Choose another name or use --force.")


def check_indices(name: str, values: Sequence[Any]) -> None:
    """PlanError unless `values` are ascending non-negative integers, at least one."""
    if not values:
        raise _MalformedError(f"{name} is empty; a layer keeps at least one.")
    previous = -1
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _MalformedError(f"{name} holds {_short(value)}, expected an integer.")
        if value < 0:
            raise _MalformedError(f"{name} holds {_short(value)}, expected an index from 0 on.")
        if value == previous:
            raise _MalformedError(f"{name} holds {_short(value)} twice.")
        if value < previous:
            order = f"{_short(value)} after {_short(previous)}"
            raise _MalformedError(f"{name} holds {order}; indices must be ascending.")
        previous = value


class _MalformedError(PlanError):
    """A defect that the caller puts a place in front of."""


def _plan(value: Any) -> Plan:
    document = _object(value, "the document")
    version = document.get("schema_version")
    if isinstance(version, bool) or version != SCHEMA_VERSION or not isinstance(version, int):
        raise _MalformedError(
            f"schema_version is {_short(version)}, expected {SCHEMA_VERSION}. "
            "Re-run 'spp plan' with this version of spp."
        )
    _check_keys(document, _REQUIRED, (*PROVENANCE, "padded"), "the document")
    model = _object(document["model"], "model")
    _check_keys(model, ("fingerprint", "source"), (), "model")
    layers = document["layers"]
    if not isinstance(layers, list) or not layers:
        raise _MalformedError(
            f"layers is {_short(layers)}, expected a list with one object per layer."
        )
    return Plan(
        _text(model["fingerprint"], "model.fingerprint"),
        _text(model["source"], "model.source"),
        _one_of(document["layout"], LAYOUTS, "layout"),
        _one_of(document["compensation"], COMPENSATIONS, "compensation"),
        tuple(_layer(index, layer) for index, layer in enumerate(layers)),
        **{name: _object(document[name], name) for name in PROVENANCE if name in document},
        padded=_flag(document.get("padded", False), "padded"),
    )


def _layer(index: int, value: Any) -> LayerPlan:
    place = f"layer {index}"
    layer = _object(value, place)
    _check_keys(layer, _LAYER_KEYS[:2], _LAYER_KEYS[2:], place)
    channels = layer.get("channels")
    return LayerPlan(
        _indices(layer["kv_heads"], f"{place}: kv_heads"),
        _indices(layer["query_heads"], f"{place}: query_heads"),
        None if channels is None else _indices(channels, f"{place}: channels"),
    )


def _indices(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise _MalformedError(f"{name} is {_short(value)}, expected a list of indices.")
    check_indices(name, value)
    return tuple(value)


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _MalformedError(f"{place} is {_short(value)}, expected a JSON object.")
    return value


def _check_keys(
    value: Mapping[str, Any], required: Sequence[str], optional: Sequence[str], place: str
) -> None:
    for name in value:
        if name not in required and name not in optional:
            known = ", ".join((*required, *optional))
            raise _MalformedError(f"{place} has the unknown key {_short(name)}; known are {known}.")
    for name in required:
        if name not in value:
            raise _MalformedError(f"{place} has no {name}.")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise _MalformedError(f"{name} is {_short(value)}, expected a text that is not empty.")
    return value


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise _MalformedError(f"{name} is {_short(value)}, expected true or false.")
    return value


def _one_of(value: Any, known: Sequence[Word], name: str) -> Word:
    for word in known:
        if value == word:
            return word
    raise _MalformedError(f"{name} is {_short(value)}, expected {' or '.join(known)}.")


def _short(value: Any) -> str:
    """A value as an error message shows it: never more than some words."""
    if isinstance(value, (dict, list)):
        return "a JSON object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
