"""plan.json in and out. A plan may be written by hand, so every value is checked on reading."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from spp_export.common.disk import file_exists, publish_file
from spp_export.common.documents import Document, Rows, printable, validated
from spp_export.common.errors import PlanError
from spp_export.common.json_files import MAX_JSON_BYTES, parse_json, read_bytes, shown
from spp_export.models.shape import Layout, ModelShape, common_size
from spp_export.planning.plan import PROVENANCE, SCHEMA_VERSION, Compensation, LayerPlan, Plan


def _ascending(indices: tuple[int, ...]) -> tuple[int, ...]:
    # Whether a layer may keep none depends on the model.
    if indices and (problem := _index_problem(indices)):
        raise ValueError(problem)
    return indices


_Line = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(printable)]
_Provenance = Annotated[dict[str, Any], Field(default_factory=dict)]
_Indices = Annotated[Rows[int], AfterValidator(_ascending)]


class _ModelDocument(Document):
    fingerprint: _Line
    source: _Line


class _LayerDocument(Document):
    kv_heads: _Indices
    query_heads: _Indices
    channels: _Indices | None = None
    experts: _Indices | None = None
    expert_channels: Rows[_Indices] | None = None


class PlanDocument(Document):
    """plan.json, see `Plan`."""

    version = SCHEMA_VERSION, "Re-run 'spp plan' with this version of spp."

    schema_version: int
    model: _ModelDocument
    layout: Layout
    padded: bool = False
    compensation: Compensation
    layers: Annotated[Rows[_LayerDocument], Field(min_length=1)]
    scenario: _Provenance
    artifacts: _Provenance
    diagnosis: _Provenance
    family: _Provenance
    calibration: _Provenance
    criterion: _Provenance
    policy: _Provenance
    budget: _Provenance
    predicted: _Provenance
    versions: _Provenance


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file of at most 16 MiB; PlanError names what is wrong with it."""
    data = read_bytes(path, what="plan", max_bytes=MAX_JSON_BYTES, error=PlanError)
    return parse_plan(data, what=f"plan {os.fspath(path)}")


def parse_plan(text: str | bytes, *, what: str = "plan") -> Plan:
    """The plan in a JSON text. `validate_plan` then compares it with a model.

    Raises PlanError, in one line that starts with `what` and names the layer and value: bad JSON,
    another schema version, unknown or missing keys, indices that are not ascending integers.
    """
    value = parse_json(text, what=what, error=PlanError)
    document = validated(PlanDocument, value, what=what, error=PlanError)
    return Plan(
        document.model.fingerprint,
        document.model.source,
        document.layout,
        document.compensation,
        tuple(
            LayerPlan(
                layer.kv_heads,
                layer.query_heads,
                layer.channels,
                layer.experts,
                layer.expert_channels,
            )
            for layer in document.layers
        ),
        **{name: getattr(document, name) for name in PROVENANCE},
        padded=document.padded,
    )


def write_plan(plan: Plan, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write plan.json atomically; OutputError where it exists (without `force`) or cannot be."""
    publish_file(Path(path), plan.to_json(), force=force)


def check_plan_target(path: str | os.PathLike[str], force: bool) -> None:
    """OutputError where `write_plan` would refuse `path`, before any work is done."""
    if not force and os.path.lexists(path):
        raise file_exists(Path(path))


def _index_problem(indices: Sequence[Any]) -> str | None:
    """What is wrong with indices that should be ascending; None if nothing."""
    previous = -1
    for index in indices:
        if type(index) is not int or index < 0:
            return f"holds {shown(index)}, expected an integer from 0 on"
        if index == previous:
            return f"holds {shown(index)} twice"
        if index < previous:
            return f"holds {shown(index)} after {shown(previous)}; indices must be ascending"
        previous = index
    return None


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
        validate_layer(index, layer, shape, ragged=plan.layout == "ragged")
        _check_experts(f"layer {index}", layer, shape, sparse=shape.sparse[index])
        _check_expert_channels(f"layer {index}", layer, shape, sparse=shape.sparse[index])
    if not any(layer.kv_heads for layer in plan.layers):
        raise PlanError(
            "plan keeps attention in no layer. Keep a KV group in one of them at least."
        )
    if plan.layout == "uniform":
        _check_uniform(plan, shape)
    if plan.model_fingerprint != fingerprint:
        raise PlanError(
            f"plan is for the model with fingerprint {plan.model_fingerprint[:40]} but this model "
            f"has {fingerprint[:40]}. {_AGAIN}"
        )


def validate_layer(
    index: int, layer: LayerPlan, shape: ModelShape, *, ragged: bool = False
) -> None:
    """PlanError unless the layer is in range and whole, and regular where it may not be `ragged`;
    of units that it does not have in the source it keeps none."""
    place = f"layer {index}"
    sparse = shape.sparse[index]
    if index in shape.without_channels and not sparse:
        _check_none(place, "MLP channels", layer.channels)
    if index in shape.without_heads:
        _check_none(place, "query heads", (*layer.query_heads, *layer.kv_heads))
    else:
        _validate_heads(place, layer, shape, ragged=ragged)
    if layer.channels is not None and sparse:
        raise PlanError(
            f"{place}: plan keeps channels, and of a layer with experts these go, or "
            "expert_channels. Plan again with --units channels."
        )
    if layer.channels is not None and index not in shape.without_channels:
        _check_range(place, "channel", layer.channels, shape.channels)


def _check_none(place: str, units: str, kept: tuple[int, ...] | None) -> None:
    if kept != ():
        raise PlanError(
            f"{place}: plan keeps {units}, and this layer has none that could go. {_AGAIN}"
        )


def _validate_heads(place: str, layer: LayerPlan, shape: ModelShape, *, ragged: bool) -> None:
    _check_range(place, "KV group", layer.kv_heads, shape.kv_heads)
    _check_range(place, "query head", layer.query_heads, shape.query_heads)
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
    for group in () if ragged else layer.kv_heads:
        first = layer.kv_heads[0]
        if heads_in[group] != heads_in[first]:
            raise PlanError(
                f"{place}: plan keeps {heads_in[first]} query heads in KV group {first} but "
                f"{heads_in[group]} in KV group {group}. Keep the same number in every kept "
                "group, or use layout ragged."
            )


def _check_experts(place: str, layer: LayerPlan, shape: ModelShape, *, sparse: bool) -> None:
    """PlanError, starting with `place`, unless the experts that the layer keeps can be routed to;
    `sparse`: whether it has any."""
    if layer.experts is None:
        return
    if not sparse:
        raise PlanError(f"{place}: plan keeps experts, and the layer has none. {_AGAIN}")
    _check_range(place, "expert", layer.experts, shape.experts)
    if len(layer.experts) < shape.experts_per_token:
        raise PlanError(
            f"{place}: plan keeps {len(layer.experts)} experts and every token is routed to "
            f"{shape.experts_per_token}. Keep as many at least."
        )
    size, least = shape.experts // shape.expert_groups, shape.expert_counts[0]
    kept = [0] * shape.expert_groups
    for expert in layer.experts:
        kept[expert // size] += 1
    if len(set(kept)) > 1 or len(layer.experts) < least:
        raise PlanError(
            f"{place}: plan keeps {' and '.join(map(str, sorted(set(kept))))} experts of a group, "
            f"and every token is routed to {shape.chosen_groups} of {shape.expert_groups} groups "
            f"(n_group). Keep as many of every group, and {least // shape.expert_groups} at least."
        )


def _check_expert_channels(
    place: str, layer: LayerPlan, shape: ModelShape, *, sparse: bool
) -> None:
    """PlanError, starting with `place`, unless every expert that stays keeps as many channels."""
    kept = layer.expert_channels
    if kept is None:
        return
    if not (sparse and shape.expert_channels):
        raise PlanError(
            f"{place}: plan keeps channels of experts, and the layer has none that could go. "
            f"{_AGAIN}"
        )
    count = shape.experts if layer.experts is None else len(layer.experts)
    widths = sorted({len(row) for row in kept})
    if len(kept) != count or len(widths) != 1 or not widths[0]:
        raise PlanError(
            f"{place}: plan keeps {'/'.join(map(str, widths))} channels of {len(kept)} experts; "
            f"each of the {count} that stay must keep as many as the others, at least 1."
        )
    for row in kept:
        _check_range(place, "channel of an expert", row, shape.expert_channels)


def _check_range(place: str, unit: str, indices: tuple[int, ...], count: int) -> None:
    if problem := _index_problem(indices):
        raise PlanError(f"{place}: the list of kept {unit}s {problem}.")
    if indices and indices[-1] >= count:
        outside = next(index for index in indices if index >= count)
        raise PlanError(
            f"{place}: plan keeps {unit} {shown(outside)} but the model has {count} "
            f"(0-{count - 1}). {_AGAIN}"
        )


def _check_uniform(plan: Plan, shape: ModelShape) -> None:
    shapes = [
        replace(layer, dropped_experts=0, dropped_channels=0) for layer in plan.layer_shapes(shape)
    ]
    alike = shape.alike(common_size(shapes))
    for index, (layer, first) in enumerate(zip(shapes, alike, strict=True)):
        lacks = [
            what
            for what, kept, dense in (
                ("attention", layer.has_attention, shape.has_heads[index]),
                ("MLP", layer.has_mlp, shape.has_channels[index]),
            )
            if dense and not kept
        ]
        if lacks:
            raise PlanError(
                f"layer {index}: plan keeps no {lacks[0]}, which a stock config cannot say. "
                "Use layout per-layer."
            )
        if layer != first:
            raise PlanError(
                f"layer {index}: plan keeps {layer.query_heads} query heads, {layer.kv_heads} KV "
                f"heads and {layer.channels} channels but the first keeps "
                f"{first.query_heads}, {first.kv_heads} and {first.channels}. A uniform layout "
                "needs the same in every layer; use layout per-layer."
            )
    counts = [count for count in shape.experts_in(plan.layer_shapes(shape)) if count]
    if len(set(counts)) > 1:
        raise PlanError(
            f"plan keeps {min(counts)} experts in one layer and {max(counts)} in another. A "
            "uniform layout needs the same in every layer; use layout per-layer."
        )
    widths = shape.expert_widths(plan.layer_shapes(shape))
    if len(set(widths)) > 1:
        raise PlanError(
            f"plan keeps {min(widths)} channels of every expert in one layer and {max(widths)} in "
            "another. A uniform layout needs the same in every layer; use layout per-layer."
        )
