"""Cuts the rows or columns of removed units out of one tensor. Pure: arrays in, arrays out.

Nothing is converted, so a caller may pass raw bits. What is cut is a copy: a view would keep the
whole tensor alive, in memory and in some file formats. Where a plan pads its layers, a `FILL` among
the units stands for one of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import PlanError
from spp_export.models.families import TensorSpec, Unit
from spp_export.planning.plan import FILL

if TYPE_CHECKING:
    from spp_export.models.shape import ModelShape
    from spp_export.planning import LayerPlan, Plan

Indices = NDArray[np.intp]


def kept_units(spec: TensorSpec, layer_plan: LayerPlan) -> tuple[int, ...] | None:
    """Source indices of the units of `spec` that stay; None where nothing is cut.

    Where the axis has several parts, they are counted through: a key after all the queries.
    """
    return _kept(spec, layer_plan, layer_plan.query_heads)


def _kept(
    spec: TensorSpec, layer_plan: LayerPlan, written: Sequence[int]
) -> tuple[int, ...] | None:
    """As `kept_units`, with query heads in the order in which they are written, `FILL` and all."""
    if spec.unit is None or spec.axis is None:
        return None
    channels = layer_plan.channels
    if spec.expert is not None:
        channels = layer_plan.channels_of(spec.expert)
    kept = {
        Unit.QUERY: layer_plan.query_heads,
        Unit.KV: layer_plan.kv_heads,
        Unit.CHANNEL: channels,
        Unit.EXPERT: layer_plan.experts,
    }
    parts = spec.parts or ((spec.unit, spec.shape[spec.axis] // spec.step),)
    counts = [count for _, count in parts]
    lists: list[Sequence[int]] = []
    for unit, count in parts:
        stay = kept[unit]
        lists.append(range(count) if stay is None else stay)
    whole = all(list(units) == list(range(n)) for units, n in zip(lists, counts, strict=True))
    if whole and not narrows_experts(spec, layer_plan):
        return None
    for units, count in zip(lists, counts, strict=True):
        _check_units(spec, units, count)
    lists = [
        written if unit is Unit.QUERY else units
        for (unit, _), units in zip(parts, lists, strict=True)
    ]
    return _beside(lists, counts) if spec.side_by_side else _after(lists, counts)


def _after(lists: Sequence[Sequence[int]], counts: Sequence[int]) -> tuple[int, ...]:
    """Units of parts that lie one after the other, counted through."""
    starts = [0, *accumulate(counts)]
    return tuple(
        unit if unit == FILL else start + unit
        for start, units in zip(starts, lists, strict=False)
        for unit in units
    )


def _beside(lists: Sequence[Sequence[int]], counts: Sequence[int]) -> tuple[int, ...]:
    """Units of parts that lie side by side, group by group of the part that has fewest, counted
    through."""
    groups = min(counts)
    sizes = [count // groups for count in counts]
    starts = [0, *accumulate(sizes)]
    whole = lists[counts.index(groups)]
    result = []
    for place, group in enumerate(whole):
        for units, size, start in zip(lists, sizes, starts, strict=False):
            if FILL in units:  # every group has as many
                share = len(units) // len(whole)
                own = units[place * share : (place + 1) * share]
            else:
                own = [unit for unit in units if unit // size == group]
            first = group * sum(sizes) + start
            result += [unit if unit == FILL else first + unit % size for unit in own]
    return tuple(result)


def written_units(spec: TensorSpec, plan: Plan, shape: ModelShape) -> tuple[int, ...] | None:
    """Units of `spec`, a tensor of the source, in the order in which they are written: `FILL` for
    zeros; None where nothing is cut. `shape` is of the source."""
    if spec.layer is None:
        return None
    layer = plan.layers[spec.layer]
    heads = layer.padded_heads(shape.group_size) if plan.padded else layer.query_heads
    return _kept(spec, layer, heads)


def real_elements(units: Sequence[int], step: int) -> Indices:
    """Elements along an axis that are not `FILL`, of `units` of `step` consecutive ones."""
    return kept_indices(np.flatnonzero(np.asarray(units) != FILL).tolist(), step)


def kept_indices(units: Sequence[int], step: int) -> Indices:
    """Indices along an axis, [len(units) * step], of units of `step` consecutive elements."""
    first = np.asarray(units, dtype=np.intp) * step
    return (first[:, None] + np.arange(step, dtype=np.intp)).reshape(-1)


def slice_tensor(array: NDArray[Any], spec: TensorSpec, layer_plan: LayerPlan) -> NDArray[Any]:
    """What `layer_plan` keeps of a whole tensor, of shape `spec.shape`: a contiguous copy.

    Returns `array` itself where nothing is cut. Raises PlanError for a unit that the tensor does
    not have, or units that are not ascending.
    """
    units = kept_units(spec, layer_plan)
    return _sliced(array, spec, units, layer_plan)


def written_tensor(
    array: NDArray[Any], spec: TensorSpec, plan: Plan, shape: ModelShape
) -> NDArray[Any]:
    """As `slice_tensor`, with the zeros that a plan pads layers with; `shape` is the source's."""
    units = written_units(spec, plan, shape)
    return array if units is None else _sliced(array, spec, units, plan.layers[spec.layer or 0])


def _sliced(
    array: NDArray[Any], spec: TensorSpec, units: Sequence[int] | None, layer: LayerPlan
) -> NDArray[Any]:
    assert array.shape == spec.shape, f"{spec.name}: {array.shape} is not {spec.shape}"
    if units is None:
        return array
    narrower = narrows_experts(spec, layer)
    return slice_experts(array, spec, layer, 0) if narrower else slice_rows(array, spec, units, 0)


def slice_rows(
    rows: NDArray[Any], spec: TensorSpec, units: Sequence[int], first_row: int
) -> NDArray[Any]:
    """What stays of the rows of a tensor from `first_row` on, if only `units` are kept.

    With the rows in blocks, the results one after another are the sliced tensor; so a tensor can
    be sliced without ever being in memory as a whole. A `FILL` must follow a unit that is kept.
    """
    listed = np.asarray(units, dtype=np.intp)
    filled = listed == FILL
    # Zeros are written over a copy of what they follow, with whose last row they come.
    source = np.maximum.accumulate(listed)
    if spec.axis == 0:
        within = np.where(filled[:, None], spec.step - 1, np.arange(spec.step))
        kept = (source[:, None] * spec.step + within).reshape(-1)
        begin, end = np.searchsorted(kept, (first_row, first_row + len(rows)))
        taken: NDArray[Any] = rows[kept[begin:end] - first_row]
        taken[np.repeat(filled, spec.step)[begin:end]] = 0
        return taken
    assert spec.axis == 1
    # Whole units rather than single elements: memory moves in runs of `step`.
    grouped = rows.reshape(len(rows), -1, spec.step)
    taken = np.take(grouped, source, axis=1)
    taken[:, filled] = 0
    return taken.reshape(len(rows), -1)


def narrows_experts(spec: TensorSpec, layer: LayerPlan) -> bool:
    """Whether a tensor is of experts that lose channels, each of them its own."""
    return spec.wide is not None and layer.expert_channels is not None


def slice_experts(
    rows: NDArray[Any], spec: TensorSpec, layer: LayerPlan, first_row: int
) -> NDArray[Any]:
    """As `slice_rows`, of a tensor [E,...] of all experts: those that stay, each with the channels
    that it keeps."""
    assert spec.wide is not None
    assert spec.axis == 0
    parts, experts = spec.form.count("C"), range(first_row, first_row + len(rows))
    count, step = spec.shape[spec.wide] // parts, parts if spec.form == "[CC]" else 1
    taken = []
    for expert in experts if layer.experts is None else sorted(set(experts) & {*layer.experts}):
        kept = layer.channels_of(expert)
        assert kept is not None
        _check_units(spec, kept, count)
        listed = kept if step > 1 else _after([kept] * parts, [count] * parts)
        places = kept_indices(listed, step)
        taken.append(np.take(rows[expert - first_row], places, axis=spec.wide - 1))
    return np.stack(taken) if taken else rows[:0]


def _check_units(spec: TensorSpec, kept: Sequence[int], count: int) -> None:
    if any(unit >= following for unit, following in pairwise(kept)):
        raise PlanError(f"layer {spec.layer}: kept {spec.unit} units are not ascending.")
    if kept and (kept[0] < 0 or kept[-1] >= count):
        wrong = kept[0] if kept[0] < 0 else kept[-1]
        raise PlanError(
            f"layer {spec.layer}: the plan keeps {spec.unit} unit {wrong}, the model has "
            f"{count} (0 to {count - 1}). Make the plan for this model."
        )
