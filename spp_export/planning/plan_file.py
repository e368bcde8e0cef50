"""plan.json in and out. A plan may be written by hand, so every value is checked on reading."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from spp_export.common.disk import file_exists, publish_file
from spp_export.common.errors import PlanError
from spp_export.common.json_files import (
    MAX_JSON_BYTES,
    check_keys,
    decode_utf8,
    json_object,
    parse_json,
    read_bytes,
    shown,
)
from spp_export.models.shape import LAYOUTS, ModelShape
from spp_export.planning.plan import COMPENSATIONS, PROVENANCE, SCHEMA_VERSION, LayerPlan, Plan

_REQUIRED = ("schema_version", "model", "layout", "compensation", "layers")
_LAYER_KEYS = ("kv_heads", "query_heads", "channels")
_MOST_TEXT = 200
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
    publish_file(Path(path), plan.to_json(), force=force)


def check_plan_target(path: str | os.PathLike[str], force: bool) -> None:
    """OutputError where `write_plan` would refuse `path`, before any work is done."""
    if not force and os.path.lexists(path):
        raise file_exists(Path(path))


def check_indices(name: str, values: Sequence[Any]) -> None:
    """PlanError unless `values` are ascending non-negative integers, at least one."""
    if not values:
        raise _MalformedError(f"{name} is empty; a layer keeps at least one.")
    previous = -1
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _MalformedError(f"{name} holds {shown(value)}, expected an integer.")
        if value < 0:
            raise _MalformedError(f"{name} holds {shown(value)}, expected an index from 0 on.")
        if value == previous:
            raise _MalformedError(f"{name} holds {shown(value)} twice.")
        if value < previous:
            order = f"{shown(value)} after {shown(previous)}"
            raise _MalformedError(f"{name} holds {order}; indices must be ascending.")
        previous = value


class _MalformedError(PlanError):
    """A defect that the caller puts a place in front of."""


def _plan(value: Any) -> Plan:
    document = json_object(value, "the document", _MalformedError)
    version = document.get("schema_version")
    if isinstance(version, bool) or version != SCHEMA_VERSION or not isinstance(version, int):
        raise _MalformedError(
            f"schema_version is {shown(version)}, expected {SCHEMA_VERSION}. "
            "Re-run 'spp plan' with this version of spp."
        )
    check_keys(document, _REQUIRED, (*PROVENANCE, "padded"), "the document", _MalformedError)
    model = json_object(document["model"], "model", _MalformedError)
    check_keys(model, ("fingerprint", "source"), (), "model", _MalformedError)
    layers = document["layers"]
    if not isinstance(layers, list) or not layers:
        raise _MalformedError(
            f"layers is {shown(layers)}, expected a list with one object per layer."
        )
    return Plan(
        _text(model["fingerprint"], "model.fingerprint"),
        _text(model["source"], "model.source"),
        _one_of(document["layout"], LAYOUTS, "layout"),
        _one_of(document["compensation"], COMPENSATIONS, "compensation"),
        tuple(_layer(index, layer) for index, layer in enumerate(layers)),
        **{
            name: json_object(document[name], name, _MalformedError)
            for name in PROVENANCE
            if name in document
        },
        padded=_flag(document.get("padded", False), "padded"),
    )


def _layer(index: int, value: Any) -> LayerPlan:
    place = f"layer {index}"
    layer = json_object(value, place, _MalformedError)
    check_keys(layer, _LAYER_KEYS[:2], _LAYER_KEYS[2:], place, _MalformedError)
    channels = layer.get("channels")
    return LayerPlan(
        _indices(layer["kv_heads"], f"{place}: kv_heads"),
        _indices(layer["query_heads"], f"{place}: query_heads"),
        None if channels is None else _indices(channels, f"{place}: channels"),
    )


def _indices(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise _MalformedError(f"{name} is {shown(value)}, expected a list of indices.")
    check_indices(name, value)
    return tuple(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= _MOST_TEXT:
        raise _MalformedError(
            f"{name} is {shown(value)}, expected a text of one line, at most {_MOST_TEXT} "
            "characters."
        )
    return value


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise _MalformedError(f"{name} is {shown(value)}, expected true or false.")
    return value


def _one_of(value: Any, known: Sequence[Word], name: str) -> Word:
    for word in known:
        if value == word:
            return word
    raise _MalformedError(f"{name} is {shown(value)}, expected {' or '.join(known)}.")


_AGAIN = "Re-run 'spp plan' for this checkpoint."


def validate_plan(plan: Plan, shape: ModelShape, fingerprint: str) -> None:
    """PlanError, in one line that names layer and value, unless `plan` can slice this model.

    `fingerprint` is the model's own; a plan made for another checkpoint is refused even where its
    indices would fit.
    """
    if len(plan.layers) != shape.num_layers:
        raise PlanError(
            f"plan has {len(plan.layers)} layers but the model has {shape.num_layers}. {_AGAIN}"
        )
    for index, layer in enumerate(plan.layers):
        validate_layer(f"layer {index}", layer, shape, ragged=plan.layout == "ragged")
    if plan.layout == "uniform":
        _check_uniform(plan, shape)
    if plan.model_fingerprint != fingerprint:
        raise PlanError(
            f"plan is for the model with fingerprint {plan.model_fingerprint[:40]} but this model "
            f"has {fingerprint[:40]}. {_AGAIN}"
        )


def validate_layer(
    place: str, layer: LayerPlan, shape: ModelShape, *, ragged: bool = False
) -> None:
    """PlanError, starting with `place`, unless the layer is in range and whole, and regular where
    it may not be `ragged`."""
    _check_range(place, "KV group", layer.kv_heads, shape.kv_heads)
    _check_range(place, "query head", layer.query_heads, shape.query_heads)
    if layer.channels is not None:
        _check_range(place, "channel", layer.channels, shape.channels)

    size = shape.group_size
    heads_in = Counter(head // size for head in layer.query_heads)
    for head in layer.query_heads:
        if head // size not in layer.kv_heads:
            raise PlanError(
                f"{place}: plan keeps query head {head} but not its KV group {head // size}. "
                "Keep both or neither."
            )
    for group in layer.kv_heads:
        if not heads_in[group]:
            raise PlanError(
                f"{place}: plan keeps KV group {group} but none of its query heads "
                f"({group * size}-{group * size + size - 1}). Drop the group or keep a head."
            )
    first = layer.kv_heads[0]
    for group in () if ragged else layer.kv_heads:
        if heads_in[group] != heads_in[first]:
            raise PlanError(
                f"{place}: plan keeps {heads_in[first]} query heads in KV group {first} but "
                f"{heads_in[group]} in KV group {group}. Keep the same number in every kept "
                "group, or use layout ragged."
            )


def _check_range(place: str, unit: str, indices: tuple[int, ...], count: int) -> None:
    check_indices(f"{place}: the list of kept {unit}s", indices)
    if indices[-1] >= count:
        outside = next(index for index in indices if index >= count)
        raise PlanError(
            f"{place}: plan keeps {unit} {shown(outside)} but the model has {count} "
            f"(0-{count - 1}). {_AGAIN}"
        )


def _check_uniform(plan: Plan, shape: ModelShape) -> None:
    shapes = plan.layer_shapes(shape)
    for index, layer in enumerate(shapes):
        if layer != shapes[0]:
            raise PlanError(
                f"layer {index}: plan keeps {layer.query_heads} query heads, {layer.kv_heads} KV "
                f"heads and {layer.channels} channels but layer 0 keeps {shapes[0].query_heads}, "
                f"{shapes[0].kv_heads} and {shapes[0].channels}. A uniform layout needs the same "
                "in every layer; use layout per-layer."
            )
