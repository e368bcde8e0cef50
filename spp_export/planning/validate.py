"""Whether a plan fits a model: indices in range, groups with heads, layers as its layout says."""

from __future__ import annotations

from collections import Counter

from spp_export.common.errors import PlanError
from spp_export.common.json_files import shown
from spp_export.models.shape import ModelShape
from spp_export.planning.plan import LayerPlan, Plan
from spp_export.planning.plan_file import check_indices

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
