"""Scores to layers: the sizes that keep the most score within a budget, and what they come to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from spp_export.allocate import (
    BoolArray,
    Options,
    UniformChoice,
    allocate,
    allocate_uniform,
    layer_options,
    size_costs,
)
from spp_export.budget import Budget, Limit
from spp_export.errors import BudgetError, PlanError
from spp_export.plans.infeasible import infeasible, uniform_infeasible
from spp_export.plans.records import LAYOUTS, LayerPlan, Layout
from spp_export.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Realised:
    """What a compiled plan comes to, against what was asked.

    limit and cost are in parameters of q, k, v and o or in KV bytes per token, as `kind` says; keep
    is the share of q, k, v and o parameters; parameters are the whole model's. score is what
    is kept of dense_score; no plan of this layout and budget keeps more than score_bound.
    For a uniform layout, accepted_query_heads are the counts that the stock config takes and the
    whitelist allows, and next_larger (query heads, KV heads) is the next size above the budget.
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

    def as_json(self) -> dict[str, Any]:
        """The record for plan.json, without what does not apply."""
        record = {name: getattr(self, name) for name in self.__slots__}
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
    """The regular layers that keep the most score within the budget: exact, no heuristics.

    scores_LH: [L,H], finite, one score per query head; a layer's score is the sum over its kept
    heads, so negative scores are dropped where a shape allows. whitelist: (layer, query head) pairs
    that must stay. accepts: for layout `uniform`, whether the stock config takes a count of query
    heads. breadth: of the scenario, needed where the budget is a strength.

    Raises BudgetError, naming the nearest budgets that can be met, and PlanError for scores or
    whitelist entries of another model.
    """
    forced = forced_heads(whitelist, shape)
    options = layer_options(scores_LH, shape, forced)
    return compile_options(options, shape, budget, layout, accepts, breadth=breadth)


def compile_options(
    options: Options,
    shape: ModelShape,
    budget: Budget,
    layout: Layout = "per-layer",
    accepts: Callable[[int], bool] = lambda query_heads: True,
    *,
    breadth: float | None = None,
) -> tuple[tuple[LayerPlan, ...], Realised]:
    """As `compile_plan`, from what every size of every layer is worth rather than from scores."""
    if layout not in LAYOUTS:
        raise PlanError(f"layout is {layout!r}, expected {' or '.join(LAYOUTS)}.")
    limit = budget.limit(shape, breadth)
    costs = size_costs(shape, limit.kind)
    uniform: UniformChoice | None = None
    try:
        if layout == "uniform":
            uniform = allocate_uniform(options, costs, limit.cost, accepts)
            groups = np.full(shape.num_layers, uniform.groups)
            heads = np.full(shape.num_layers, uniform.heads)
            bound = uniform.value
        else:
            choice = allocate(options, costs, limit.cost)
            groups = choice.options // shape.group_size + 1
            heads = choice.options % shape.group_size + 1
            bound = choice.bound
    except BudgetError:
        if layout == "uniform":
            raise uniform_infeasible(shape, budget, limit, options, accepts) from None
        raise infeasible(shape, budget, limit, options) from None
    layers = layer_plans(options.kept(groups, heads))
    return layers, _realised(shape, limit, layers, options, bound, uniform)


def layer_plans(kept_LGg: BoolArray) -> tuple[LayerPlan, ...]:
    """One LayerPlan per layer of a mask of kept query heads [L,G,g]; all channels stay."""
    return tuple(
        LayerPlan(
            tuple(np.flatnonzero(mask.any(axis=1)).tolist()), tuple(np.flatnonzero(mask).tolist())
        )
        for mask in kept_LGg
    )


def forced_heads(whitelist: Iterable[tuple[int, int]], shape: ModelShape) -> BoolArray:
    """A whitelist of (layer, query head) as a mask [L,H]; PlanError for a head out of range."""
    forced = np.zeros((shape.num_layers, shape.query_heads), dtype=bool)
    for layer, head in whitelist:
        if not (0 <= layer < shape.num_layers and 0 <= head < shape.query_heads):
            raise PlanError(
                f"layer {layer}: the whitelist holds query head {head} but the model has "
                f"{shape.num_layers} layers of {shape.query_heads}. Use artifacts of this model."
            )
        forced[layer, head] = True
    return forced


def _realised(
    shape: ModelShape,
    limit: Limit,
    layers: tuple[LayerPlan, ...],
    options: Options,
    bound: float,
    uniform: UniformChoice | None,
) -> Realised:
    shapes = [layer.shape(shape) for layer in layers]
    groups = np.array([layer.kv_heads for layer in shapes])
    heads = np.array([layer.query_heads for layer in shapes]) // groups
    head_parameters = shape.head_parameters(shapes)
    kv_bytes = shape.kv_bytes_per_token(shapes)
    return Realised(
        kind=limit.kind,
        limit=limit.cost,
        cost=head_parameters if limit.kind == "parameters" else kv_bytes,
        keep=head_parameters / shape.head_parameters(shape.layers),
        parameters=shape.parameters(shapes),
        kv_bytes_per_token=kv_bytes,
        score=float(options.value[np.arange(len(layers)), groups - 1, heads - 1].sum()),
        dense_score=float(options.value[:, -1, -1].sum()),
        score_bound=bound,
        accepted_query_heads=uniform.accepted if uniform else None,
        next_larger=_heads(uniform.next_larger) if uniform else None,
    )


def _heads(size: tuple[int, int] | None) -> tuple[int, int] | None:
    """(query heads, KV heads) of a size given as (KV groups, query heads per group)."""
    return None if size is None else (size[0] * size[1], size[0])
