"""Scores to layers: the sizes that keep the most score within a budget, and what they come to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from spp_export.common.arrays import BoolArray, IntArray
from spp_export.common.errors import BudgetError, PlanError
from spp_export.models.shape import (
    LAYOUTS,
    LayerShape,
    Layout,
    ModelShape,
    Units,
    includes,
    kept_share,
    mlp_channel_parameters,
)
from spp_export.planning.allocate.options import (
    ExpertOptions,
    NestedOptions,
    Options,
    layer_options,
    ragged_options,
    splittable_channels,
    splittable_heads,
)
from spp_export.planning.allocate.sizes import (
    Candidates,
    UniformChoice,
    allocate,
    allocate_some,
    choose_uniform,
    expert_costs,
    head_costs,
    smallest_cost,
    uniform_sizes,
    width_costs,
)
from spp_export.planning.budget import Budget, Limit, unit_cost
from spp_export.planning.infeasible import infeasible, uniform_infeasible
from spp_export.planning.latency import LatencyTable
from spp_export.planning.plan import LayerPlan, only_existing


@dataclass(frozen=True, slots=True)
class Realised:
    """What a compiled plan comes to, against its budget.

    limit and cost are in parameters of the units that may go, in KV bytes per token or in
    nanoseconds of the units' blocks, as `kind` says; keep is the share of the units' parameters;
    parameters are the whole model's. score is what is kept of dense_score; no plan of this layout
    and budget keeps more than score_bound.
    For a uniform layout, accepted_query_heads are the counts that the stock config takes and the
    whitelist allows, and next_larger (query heads, KV heads) and next_larger_channels are the next
    size above the budget.
    Where other units than heads may go: units, and the kept shares of the parameters of q, k, v and
    o (head_keep) and of gate, up and down (channel_keep) or of experts (expert_keep), of which
    next_larger_experts is the next larger number. Channels are those of MLPs, or of every expert;
    where a model has both, next_larger_channels is of experts, next_larger_mlp_channels of MLPs,
    and mlp_keep the share that these keep of their parameters.
    """

    kind: str
    limit: int
    cost: int
    keep: float
    parameters: int
    kv_bytes_per_token: int
    score: float
    dense_score: float
    score_bound: float
    accepted_query_heads: tuple[int, ...] | None = None
    next_larger: tuple[int, int] | None = None
    next_larger_channels: int | None = None
    units: str | None = None
    head_keep: float | None = None
    channel_keep: float | None = None
    expert_keep: float | None = None
    next_larger_experts: int | None = None
    next_larger_mlp_channels: int | None = None
    mlp_keep: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record for plan.json, without what does not apply."""
        record = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in record.items() if value is not None}


def compile_plan(
    scores_LH: ArrayLike,
    shape: ModelShape,
    budget: Budget,
    layout: Layout = "per-layer",
    whitelist: Iterable[tuple[int, int]] = (),
    accepts: Callable[[int], bool] = lambda query_heads: True,
    *,
    breadth: float | None = None,
) -> tuple[tuple[LayerPlan, ...], Realised]:
    """The layers that keep the most score within the budget: exact, no heuristics.

    They are regular but for layout `ragged`. scores_LH: [L,H], finite, one score per query head; a
    layer's score is the sum over its kept heads, so negative scores are dropped where a shape
    allows. whitelist: (layer, query head) pairs
    that must stay. accepts: for layout `uniform`, whether the stock config takes a count of query
    heads. breadth: of the scenario, needed where the budget is a strength.

    Raises BudgetError, naming the nearest budgets that can be met, and PlanError for scores or
    whitelist entries of another model.
    """
    forced = forced_heads(whitelist, shape)
    options = options_of(layout)(scores_LH, shape, forced)
    return compile_units(options, None, shape, budget, layout, accepts, breadth=breadth)


def options_of(layout: Layout) -> Callable[[ArrayLike, ModelShape, BoolArray | None], Options]:
    """What turns scores into the sizes that layers of this layout may have."""
    return ragged_options if layout == "ragged" else layer_options


def compile_units(
    heads: Options | None,
    channels: NestedOptions | None,
    shape: ModelShape,
    budget: Budget,
    layout: Layout = "per-layer",
    accepts: Callable[[int], bool] = lambda query_heads: True,
    *,
    breadth: float | None = None,
    latency: LatencyTable | None = None,
    tensor_parallel: int = 1,
    experts: ExpertOptions | None = None,
) -> tuple[tuple[LayerPlan, ...], Realised]:
    """As `compile_plan`, from what every size of every layer is worth: of heads, of channels of
    MLPs, and of experts and their channels, in competition. Layers are ragged only where the sizes
    of heads are.

    None means that all of those units stay; it must agree with the units of the budget. latency:
    the table, needed where the budget's cost is that; a table of another model is a ProfileError,
    and layout `ragged`, whose shapes no table has, a PlanError. tensor_parallel: the cards that
    every layer must divide among (`LayerShape.splits`), which no ragged layer does.
    """
    assert (heads is not None) == includes(budget.units, "heads"), "options of heads"
    narrower = includes(budget.units, "channels")
    of_experts = includes(budget.units, "experts") or (narrower and shape.expert_channels > 0)
    assert (experts is not None) == of_experts, "options of experts"
    assert (channels is not None) == (narrower and shape.has_mlps), "options of channels"
    if layout not in LAYOUTS:
        raise PlanError(f"layout is {layout!r}, expected {' or '.join(LAYOUTS)}.")
    if layout == "ragged" and budget.cost == "latency":
        raise PlanError("layout is ragged, and tables of latency have regular layers only.")
    dense_score = _score(heads, channels, experts, shape, shape.layers)
    heads, channels, experts = _splittable(heads, channels, experts, shape, layout, tensor_parallel)
    limit = budget.limit(shape, breadth, latency)
    uniform: UniformChoice | None = None
    bound: float | None = None
    if layout == "uniform":
        uniform = _uniform(heads, channels, experts, shape, budget, limit, accepts)
        shapes = shape.alike(uniform.layer)
    else:
        shapes, bound = _per_layer(heads, channels, experts, shape, budget, limit)
    kept = layer_plans(
        _kept_heads(heads, shape, shapes),
        None if channels is None else channels.kept([layer.channels for layer in shapes]),
        *_kept_experts(experts, shape, shapes),
    )
    layers = only_existing(kept, shape)
    score = _score(heads, channels, experts, shape, shapes)
    realised = Realised(
        **_figures(shape, budget, limit, shapes),
        score=score,
        dense_score=dense_score,
        score_bound=score if bound is None else bound,
        **({} if uniform is None else _alternatives(uniform, shape, budget)),
    )
    return layers, realised


def check_feasible(
    heads: Options | None,
    channels: NestedOptions | None,
    shape: ModelShape,
    budget: Budget,
    layout: Layout = "per-layer",
    accepts: Callable[[int], bool] = lambda query_heads: True,
    *,
    breadth: float | None = None,
    latency: LatencyTable | None = None,
    tensor_parallel: int = 1,
    experts: ExpertOptions | None = None,
) -> None:
    """The errors that `compile_units` would raise, whatever the sizes are worth."""
    heads, channels, experts = _splittable(heads, channels, experts, shape, layout, tensor_parallel)
    limit = budget.limit(shape, breadth, latency)
    if layout == "uniform":
        _uniform(heads, channels, experts, shape, budget, limit, accepts)
        return
    candidates = _candidates(heads, channels, experts, shape, limit, budget.units)
    if smallest_cost(candidates, some=_may_be_none(heads)) > limit.cost:
        raise infeasible(
            shape, budget, limit, candidates, (channels, experts), some=_may_be_none(heads)
        )


def _splittable(
    heads: Options | None,
    channels: NestedOptions | None,
    experts: ExpertOptions | None,
    shape: ModelShape,
    layout: Layout,
    ways: int,
) -> tuple[Options | None, NestedOptions | None, ExpertOptions | None]:
    """What may be chosen of all kinds of units; PlanError where units that stay do not divide."""
    if ways == 1:
        return heads, channels, experts
    if layout == "ragged":
        raise PlanError("layout is ragged, whose layers divide among no cards. Use per-layer.")
    if heads is None and not LayerShape(shape.query_heads, shape.kv_heads, ways).splits(ways):
        raise PlanError(
            f"{shape.query_heads} query heads in {shape.kv_heads} KV groups stay in every layer "
            f"and do not divide among {ways} cards. Let heads go, too: --units both."
        )
    narrower = experts is not None and experts.channels is not None
    if channels is None and not narrower and shape.channels % ways:
        raise PlanError(
            f"{shape.channels} channels stay in every layer and do not divide among {ways} cards. "
            "Let channels go, too: --units both."
        )
    return (
        None if heads is None else splittable_heads(heads, ways),
        None if channels is None else splittable_channels(channels, ways),
        splittable_channels(experts, ways) if experts is not None and narrower else experts,
    )


def layer_plans(
    kept_LGg: BoolArray,
    kept_LI: BoolArray | None = None,
    kept_LE: BoolArray | None = None,
    kept_LEF: BoolArray | None = None,
) -> tuple[LayerPlan, ...]:
    """One LayerPlan per layer of masks of kept query heads [L,G,g], channels [L,I], experts [L,E]
    and channels of every expert [L,E,F].

    Without a mask, or where a layer's is full, all its channels or experts stay and none is listed.
    """
    rows = [None] * len(kept_LGg)
    masks = (rows if mask is None else mask for mask in (kept_LI, kept_LE, kept_LEF))
    return tuple(
        LayerPlan(
            tuple(np.flatnonzero(mask.any(axis=1)).tolist()),
            tuple(np.flatnonzero(mask).tolist()),
            _unless_all(channels),
            _unless_all(experts),
            _rows_unless_all(inside, experts),
        )
        for mask, channels, experts, inside in zip(kept_LGg, *masks, strict=True)
    )


def _rows_unless_all(
    mask: BoolArray | None, experts: BoolArray | None
) -> tuple[tuple[int, ...], ...] | None:
    """Of the experts that stay."""
    if mask is None or mask.all():
        return None
    stay = mask if experts is None else mask[experts]
    return tuple(tuple(np.flatnonzero(row).tolist()) for row in stay)


def _unless_all(mask: BoolArray | None) -> tuple[int, ...] | None:
    return None if mask is None or mask.all() else tuple(np.flatnonzero(mask).tolist())


def forced_heads(whitelist: Iterable[tuple[int, int]], shape: ModelShape) -> BoolArray:
    """A whitelist of (layer, query head) as a mask [L,H]; PlanError for a head out of range."""
    forced = np.zeros((shape.num_layers, shape.query_heads), dtype=bool)
    for layer, head in whitelist:
        if not (0 <= layer < shape.num_layers and 0 <= head < shape.query_heads):
            raise PlanError(
                f"layer {layer}: the whitelist holds query head {head} but the model has "
                f"{shape.num_layers} layers of {shape.query_heads}. Use artifacts of this model."
            )
        forced[layer, head] = layer not in shape.without_heads
    return forced


def _uniform(
    heads: Options | None,
    channels: NestedOptions | None,
    experts: ExpertOptions | None,
    shape: ModelShape,
    budget: Budget,
    limit: Limit,
    accepts: Callable[[int], bool],
) -> UniformChoice:
    sizes = uniform_sizes(
        heads, channels, shape, limit.kind, accepts, limit.latency, experts, budget.units
    )
    try:
        return choose_uniform(sizes, limit.cost)
    except BudgetError:
        raise uniform_infeasible(shape, budget, limit, sizes) from None


def _per_layer(
    heads: Options | None,
    channels: NestedOptions | None,
    experts: ExpertOptions | None,
    shape: ModelShape,
    budget: Budget,
    limit: Limit,
) -> tuple[tuple[LayerShape, ...], float | None]:
    """The best size of every layer, and the proven bound where it is not proven best."""
    candidates = _candidates(heads, channels, experts, shape, limit, budget.units)
    some = _may_be_none(heads)
    try:
        picks, choice = allocate(candidates, limit.cost)
        if some and (picks[0] == candidates[0].value.shape[1] - 1).all():
            # A model without any attention reads its last token only.
            picks, choice = allocate_some(candidates, limit.cost)
    except BudgetError:
        widths = channels, experts
        raise infeasible(shape, budget, limit, candidates, widths, some=some) from None
    groups = np.full(shape.num_layers, shape.kv_heads)
    query = np.full(shape.num_layers, shape.query_heads)
    inner = np.full(shape.num_layers, shape.channels)
    dropped, narrower = np.zeros((2, shape.num_layers), dtype=np.int64)
    picked = iter(picks)
    if heads is not None:
        sizes = next(picked)
        rows, columns = heads.query_heads.shape
        groups = np.append(np.repeat(np.arange(1, rows + 1), columns), 0)[sizes]
        query = np.append(heads.query_heads.ravel(), 0)[sizes]
    if channels is not None:
        inner = np.array(channels.widths)[next(picked)]
    if experts is not None:
        sparse = list(shape.sparse)
        count, width = np.divmod(next(picked), len(experts.widths))
        dropped[sparse] = shape.experts - np.array(experts.counts)[count]
        narrower[sparse] = shape.expert_channels - np.array(experts.widths)[width]
    counts = (of.tolist() for of in (query, groups, inner, dropped, narrower))
    layers = [LayerShape(q, g, c, (), *fewer) for q, g, c, *fewer in zip(*counts, strict=True)]
    return shape.existing(layers), None if choice.exact else choice.bound


def _may_be_none(heads: Options | None) -> bool:
    """Whether a layer may be left without attention."""
    return heads is not None and heads.nothing is not None


def _candidates(
    heads: Options | None,
    channels: NestedOptions | None,
    experts: ExpertOptions | None,
    shape: ModelShape,
    limit: Limit,
    units: Units,
) -> list[Candidates]:
    candidates = []
    if heads is not None:
        costs = head_costs(shape, limit.kind, heads.query_heads, limit.latency)
        candidates.append(Candidates.of_heads(heads, costs, shape.has_heads))
    if channels is not None:
        costs = width_costs(shape, channels.widths, limit.latency)
        candidates.append(Candidates.nested(channels, costs, shape.has_channels))
    if experts is not None:
        costs = expert_costs(shape, experts, units)
        candidates.append(Candidates.of_experts(experts, costs))
    return candidates


def _kept_heads(
    heads: Options | None, shape: ModelShape, shapes: Sequence[LayerShape]
) -> BoolArray:
    if heads is None:
        return np.ones((shape.num_layers, shape.kv_heads, shape.group_size), dtype=bool)
    return heads.kept(*_counts(heads, shapes))


def _counts(heads: Options, shapes: Sequence[LayerShape]) -> tuple[IntArray, IntArray]:
    """KV groups and count of heads [L] by which `heads` knows the sizes of these layers."""
    groups = np.array([layer.kv_heads for layer in shapes])
    query = np.array([layer.query_heads for layer in shapes])
    return groups, (heads.query_heads[groups - 1] == query[:, None]).argmax(axis=1) + 1


def _kept_experts(
    experts: ExpertOptions | None, shape: ModelShape, shapes: Sequence[LayerShape]
) -> tuple[BoolArray | None, BoolArray | None]:
    """Kept experts [L,E], and kept channels [L,E,F] of all of them where some may go."""
    if experts is None:
        return None, None
    sparse = list(shape.sparse)
    kept = np.ones((len(shapes), shape.experts), dtype=bool)
    kept[sparse], channels = experts.kept(*_expert_sizes(experts, shape, shapes))
    if channels is None:
        return kept, None
    inside = np.ones((len(shapes), *channels.shape[1:]), dtype=bool)
    inside[sparse] = channels
    return kept, inside


def _expert_sizes(
    experts: ExpertOptions, shape: ModelShape, shapes: Sequence[LayerShape]
) -> tuple[list[int], list[int]]:
    """Numbers of experts and their widths, of the layers that have any."""
    counts = [count for count in shape.experts_in(shapes) if count]
    return counts, shape.expert_widths(shapes) or list(experts.widths) * len(counts)


def _score(
    heads: Options | None,
    channels: NestedOptions | None,
    experts: ExpertOptions | None,
    shape: ModelShape,
    shapes: Sequence[LayerShape],
) -> float:
    """Worth of layers of these sizes, of the units that may go."""
    layers, total = np.arange(len(shapes)), 0.0
    if heads is not None:
        groups, count = _counts(heads, shapes)
        worth = heads.value[layers, groups - 1, count - 1]
        if heads.nothing is not None:
            worth = np.where(groups > 0, worth, heads.nothing)
        total += float(worth[np.array(shape.has_heads)].sum())
    if channels is not None:
        at = np.searchsorted(channels.widths, [layer.channels for layer in shapes])
        total += float(channels.value[layers, at][np.array(shape.has_channels)].sum())
    if experts is not None:
        count, width = experts.places(*_expert_sizes(experts, shape, shapes))
        total += float(experts.value[np.arange(len(count)), count, width].sum())
    return total


def _figures(
    shape: ModelShape, budget: Budget, limit: Limit, shapes: Sequence[LayerShape]
) -> dict[str, Any]:
    """The entries of `Realised` that follow from the sizes alone."""
    figures: dict[str, Any] = {
        "kind": limit.kind,
        "limit": limit.cost,
        "cost": unit_cost(shape, shapes, budget.units, limit.kind, limit.latency),
        "keep": kept_share(shape, shapes, budget.units),
        "parameters": shape.parameters(shapes),
        "kv_bytes_per_token": shape.kv_bytes_per_token(shapes),
    }
    if budget.units != "heads":
        figures["units"] = budget.units
        figures["head_keep"] = kept_share(shape, shapes, "heads")
        of_mlps: Units = "experts" if includes(budget.units, "experts") else "channels"
        figures[f"{of_mlps.removesuffix('s')}_keep"] = kept_share(shape, shapes, of_mlps)
    if includes(budget.units, "channels") and shape.has_mlps and any(shape.sparse):
        kept, whole = (mlp_channel_parameters(shape, of) for of in (shapes, shape.layers))
        figures["mlp_keep"] = kept / whole
    return figures


def _alternatives(uniform: UniformChoice, shape: ModelShape, budget: Budget) -> dict[str, Any]:
    """The entries of `Realised` about other uniform sizes, of the units that may go."""
    larger = uniform.next_larger
    entries: dict[str, Any] = {}
    if includes(budget.units, "heads"):
        entries["accepted_query_heads"] = uniform.accepted
        entries["next_larger"] = larger and (larger.query_heads, larger.kv_heads)
    if includes(budget.units, "channels"):
        inside = shape.expert_channels
        width = larger and (inside - larger.dropped_channels if inside else larger.channels)
        entries["next_larger_channels"] = width
        if inside and shape.has_mlps:
            entries["next_larger_mlp_channels"] = larger and larger.channels
    if includes(budget.units, "experts"):
        entries["next_larger_experts"] = larger and shape.experts - larger.dropped_experts
    return entries


def cover(
    kept_LH: ArrayLike, shape: ModelShape, scores_LH: ArrayLike | None = None
) -> tuple[LayerPlan, ...]:
    """The smallest regular layers that contain the kept query heads [L,H].

    A layer gets every group that has a kept head, and in each of them as many heads as the fullest
    needs; an empty layer gets one head. Room that is left goes to the heads of highest score, or
    to those of lowest index. Costs grow with both counts, so no regular layer around these heads
    is smaller in parameters or KV cache. PlanError where the mask or the scores have another shape.
    """
    kept = np.asarray(kept_LH, dtype=bool)
    scores = np.zeros(kept.shape) if scores_LH is None else scores_LH
    options = layer_options(scores, shape, kept)
    per_group = kept.reshape(options.value.shape).sum(axis=2)
    groups = np.maximum((per_group > 0).sum(axis=1), 1)
    heads = np.maximum(per_group.max(axis=1), 1)
    return only_existing(layer_plans(options.kept(groups, heads)), shape)


def exactly(kept_LH: ArrayLike, shape: ModelShape, scores_LH: ArrayLike) -> tuple[LayerPlan, ...]:
    """The ragged layers of the kept query heads [L,H]; an empty layer gets its best head.

    PlanError where the mask or the scores have another shape.
    """
    kept = np.array(kept_LH, dtype=bool)
    options = ragged_options(scores_LH, shape, kept)
    per_group = kept.reshape(len(kept), shape.kv_heads, -1).any(axis=2)
    groups, heads = per_group.sum(axis=1), kept.sum(axis=1)
    kept_LGg = options.kept(np.maximum(groups, 1), np.maximum(heads, 1))
    return only_existing(layer_plans(kept_LGg), shape)
