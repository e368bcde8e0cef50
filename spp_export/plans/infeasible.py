"""Errors for budgets that no plan can meet: what was asked, what is possible, what to ask for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from spp_export.allocate import Options, size_costs, sizes, stock_sizes
from spp_export.budget import Budget, Limit
from spp_export.errors import BudgetError
from spp_export.shape import ModelShape


def infeasible(shape: ModelShape, budget: Budget, limit: Limit, options: Options) -> BudgetError:
    """The error for layers of any regular size, naming the smallest total."""
    costs = np.where(options.value > -np.inf, size_costs(shape, limit.kind), np.inf)
    smallest = int(costs.min(axis=(1, 2)).sum())
    return BudgetError(
        f"{_asked(budget, limit)} is below the smallest plan, "
        f"{_figure(shape, budget, smallest)} (one KV group per layer, and the whitelist). "
        f"{_advice(shape, budget, smallest)}"
    )


def uniform_infeasible(
    shape: ModelShape,
    budget: Budget,
    limit: Limit,
    options: Options,
    accepts: Callable[[int], bool],
) -> BudgetError:
    """The error for one size in all layers, naming the nearest on both sides of the budget."""
    groups, heads = sizes(options)
    counts, stock = groups * heads, stock_sizes(options, accepts)
    valid = stock & (options.value > -np.inf).all(axis=0)
    cost = size_costs(shape, limit.kind) * shape.num_layers
    asked = _asked(budget, limit)
    if not valid.any():
        return BudgetError(f"{asked}: the stock config accepts no size. Use layout per-layer.")

    def describe(index: int) -> str:
        figure = _figure(shape, budget, int(cost.flat[index]))
        return f"{counts.flat[index]} query heads in {index // heads.size + 1} KV groups, {figure}"

    above = int(np.flatnonzero(valid & (cost == cost[valid].min()))[-1])
    text = f"{asked} is below the smallest uniform plan ({describe(above)})"
    within = stock & (cost <= limit.cost)
    if within.any():
        below = int(np.flatnonzero(within & (cost == cost[within].max()))[-1])
        text += f"; the next below ({describe(below)}) drops whitelisted heads"
    accepted = ", ".join(map(str, np.unique(counts[stock]).tolist()))
    return BudgetError(
        f"{text}. The stock config accepts {accepted} query heads. "
        f"{_advice(shape, budget, int(cost.flat[above]))}"
    )


def _asked(budget: Budget, limit: Limit) -> str:
    (name, value), *_ = budget.as_json().items()
    text = f"budget {name} {value}"
    return text + f" (keep {limit.keep:.4f})" if name == "strength" else text


def _nearest(shape: ModelShape, budget: Budget, cost: int) -> float | int:
    """The smallest value of the user's own budget that allows head cost `cost`."""
    dense = shape.head_parameters(shape.layers)
    if budget.max_kv_bytes is not None:
        return cost
    if budget.max_params is not None:
        return cost + shape.parameters(shape.layers) - dense
    return -(-cost * 10_000 // dense) / 10_000


def _figure(shape: ModelShape, budget: Budget, cost: int) -> str:
    value = _nearest(shape, budget, cost)
    if budget.max_kv_bytes is not None:
        return f"{value} bytes of KV cache per token"
    if budget.max_params is not None:
        return f"{value} parameters"
    return f"{value:.4f} of the head parameters"


def _advice(shape: ModelShape, budget: Budget, cost: int) -> str:
    if budget.strength is not None:
        return "Lower the strength."
    (name, _), *_ = budget.as_json().items()
    return f"Ask for {name} {_nearest(shape, budget, cost)} or more."
