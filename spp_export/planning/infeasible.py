"""Errors for budgets that no plan can meet: the request, what is possible, and what to request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spp_export.common.errors import BudgetError
from spp_export.models.shape import ModelShape, includes, unit_parameters
from spp_export.planning.allocate.options import ExpertOptions, NestedOptions
from spp_export.planning.allocate.sizes import Candidates, UniformSizes, smallest_cost
from spp_export.planning.budget import Budget, Limit, unit_cost

_WHOSE = {
    "heads": "head",
    "channels": "channel",
    "both": "head and channel",
    "experts": "expert",
    "all": "head and expert",
}


def infeasible(
    shape: ModelShape,
    budget: Budget,
    limit: Limit,
    candidates: Sequence[Candidates],
    widths: tuple[NestedOptions | None, ExpertOptions | None],
    *,
    some: bool = False,
) -> BudgetError:
    """The error for layers of any regular size, naming the smallest total; `widths` are what MLPs
    and experts may keep, and `some` is as of `smallest_cost`."""
    smallest = smallest_cost(candidates, some=some)
    of_mlps = "MLP" if shape.expert_channels else "layer"
    width = " and ".join(
        f"{options.widths[0]} channels per {of}"
        for options, of in zip(widths, (of_mlps, "expert"), strict=True)
        if options is not None
    )
    count = f"{next(iter(shape.expert_counts), 0)} experts in every layer that has any"
    # The fastest size need not be the smallest.
    whose = "the fastest blocks measured"
    group = f"one KV group {'in one' if some else 'per'} layer"
    least = (
        whose
        if limit.kind == "latency"
        else {
            "heads": f"{group}, and the whitelist",
            "channels": width,
            "both": f"{group if some else 'one KV group'} and {width}, and the whitelist",
            "experts": count,
            "all": f"{group}, {count} with {width}, and the whitelist",
        }[budget.units]
    )
    return BudgetError(
        f"{_request(budget, limit)} is below the smallest plan, "
        f"{_figure(shape, budget, limit, smallest)} ({least}). "
        f"{_advice(shape, budget, limit, smallest)}"
    )


def uniform_infeasible(
    shape: ModelShape, budget: Budget, limit: Limit, sizes: UniformSizes
) -> BudgetError:
    """The error for one size in all layers, naming the nearest on both sides of the budget."""
    request = _request(budget, limit)
    above = sizes.cheapest(sizes.valid)
    if above is None:
        return BudgetError(f"{request}: the stock config accepts no size. Use layout per-layer.")

    def describe(index: int) -> str:
        layer = sizes.layer(index)
        heads = f"{layer.query_heads} query heads in {layer.kv_heads} KV groups"
        inside = f"{sizes.widths[index]} channels"
        kept = [f"{inside} of every expert"] if shape.expert_channels else []
        if shape.has_mlps:
            mlps = " of every MLP" if shape.expert_channels else ""
            kept.insert(0, f"{sizes.channels[index]} channels{mlps}")
        experts = f"{sizes.experts[index]} experts"
        size = {
            "heads": heads,
            "channels": " and ".join(kept),
            "both": " and ".join([heads, *kept]),
            "experts": experts,
            "all": " and ".join([heads, *kept[:-1], f"{experts} of {inside}"]),
        }
        return f"{size[budget.units]}, {_figure(shape, budget, limit, int(sizes.cost[index]))}"

    text = f"{request} is below the smallest uniform plan ({describe(above)})"
    within = sizes.stock & (sizes.cost <= limit.cost)
    if within.any():
        below = int(np.flatnonzero(within & (sizes.cost == sizes.cost[within].max()))[-1])
        text += f"; the next below ({describe(below)}) drops whitelisted heads"
    if includes(budget.units, "heads"):
        accepted = ", ".join(map(str, np.unique(sizes.query_heads[sizes.stock]).tolist()))
        text += f". The stock config accepts {accepted} query heads"
    return BudgetError(f"{text}. {_advice(shape, budget, limit, int(sizes.cost[above]))}")


def _request(budget: Budget, limit: Limit) -> str:
    (name, value), *_ = budget.to_dict().items()
    text = f"budget {name} {value}"
    return text + f" (keep {limit.keep:.4f})" if name == "strength" else text


def _nearest(shape: ModelShape, budget: Budget, limit: Limit, cost: int) -> float | int:
    """The smallest value of the user's own budget that allows the units' cost `cost`."""
    if budget.max_kv_bytes is not None:
        return cost
    if budget.max_params is not None:
        dense = unit_parameters(shape, shape.layers, budget.units)
        return cost + shape.parameters(shape.layers) - dense
    if budget.max_latency is not None and limit.latency is not None:
        # In whole microseconds, rounded up.
        return -(-(cost + limit.latency.fixed_cost(shape, budget.units)) // 1000) / 1000
    dense = unit_cost(shape, shape.layers, budget.units, limit.kind, limit.latency)
    return -(-cost * 10_000 // dense) / 10_000


def _figure(shape: ModelShape, budget: Budget, limit: Limit, cost: int) -> str:
    value = _nearest(shape, budget, limit, cost)
    if budget.max_kv_bytes is not None:
        return f"{value} bytes of KV cache per token"
    if budget.max_params is not None:
        return f"{value} parameters"
    if budget.max_latency is not None:
        return f"{value} ms per step"
    what = {
        "parameters": f"{_WHOSE[budget.units]} parameters",
        "kv-bytes": "bytes of KV cache",
        "latency": f"latency of {_WHOSE[budget.units]} blocks",
    }
    return f"{value:.4f} of the {what[limit.kind]}"


def _advice(shape: ModelShape, budget: Budget, limit: Limit, cost: int) -> str:
    if budget.strength is not None:
        return "Lower the strength."
    (name, _), *_ = budget.to_dict().items()
    return f"Ask for {name} {_nearest(shape, budget, limit, cost)} or more."
