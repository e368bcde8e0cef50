"""Exact multiple-choice knapsack: one option for every layer, the most value within a budget.

The Lagrangian relaxation gives a price per unit of cost and an upper bound (Sinha and Zoltners,
"The multiple-choice knapsack problem", 1979). Dynamic programming over Pareto states then settles
the layers one by one, the most contested first, and drops every state whose bound is below the
best solution known (Pisinger, "A minimal algorithm for the multiple-choice knapsack problem",
1995).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from spp_export.common.arrays import FloatArray, IndexArray
from spp_export.common.errors import BudgetError

# Scores of real models leave some hundred states open; value proportional to cost leaves the most.
STATE_LIMIT = 1 << 14
# Room for rounding, relative: sums of products of floats stay well inside it.
_SLACK = 2.0**-44
_MAX_PRICES = 100


@dataclass(frozen=True, slots=True)
class Choice:
    """The option chosen in each layer [L], total value and cost, and the proven upper bound."""

    options: IndexArray
    value: float
    cost: float
    bound: float

    @property
    def exact(self) -> bool:
        """Whether it is proven that no choice within the budget has more value."""
        return self.bound <= self.value


def choose(
    values_LO: ArrayLike, costs_LO: ArrayLike, budget: float, *, state_limit: int = STATE_LIMIT
) -> Choice:
    """The choice of one option per layer with the most value and a total cost within `budget`.

    values_LO: [L,O] floats, -inf where a layer has no such option. costs_LO: [L,O], or [O] where
    all layers cost the same; positive integers or floats. At equal value the lower cost wins, then
    an order fixed by the inputs. Optimal to the last bits of a float64 sum, unless more than
    `state_limit` states stay open; then `bound` proves how far from optimal it can be.

    Raises BudgetError where even the cheapest options exceed the budget.
    """
    raw_values, raw_costs = np.asarray(values_LO, dtype=np.float64), np.asarray(costs_LO)
    values = on_grid(raw_values, len(raw_values))
    costs = on_grid(raw_costs.astype(np.float64), len(values))
    costs = np.broadcast_to(costs, values.shape)
    if raw_costs.dtype.kind == "f":
        budget = budget * (1 + _SLACK)
    cheapest = _cheapest(values, costs)
    if (smallest := _total(costs, cheapest)) > budget:
        raise BudgetError(f"the budget {budget:g} is below the smallest total cost {smallest:g}.")
    most = _most_valuable(values, costs)
    if _total(costs, most) <= budget:
        value = _total(values, most)
        return Choice(most, value, _total(costs, most), value)
    price, start = _relax(values, costs, budget, cheapest, most)
    return _settle(_problem(values, costs, budget, price, start), state_limit)


def on_grid(numbers: FloatArray, terms: int) -> FloatArray:
    """`numbers` rounded to multiples of a power of two such that any sum of `terms` of them is
    exact in float64, whatever the order; infinities stay."""
    finite = numbers[np.isfinite(numbers)]
    largest = np.abs(finite).max() if finite.size else 0.0
    if largest == 0.0:
        return numbers
    exponent = int(np.frexp(largest)[1]) + terms.bit_length() - 53
    return np.ldexp(np.rint(np.ldexp(numbers, -exponent)), exponent)


def _total(numbers_LO: FloatArray, picks: IndexArray) -> float:
    return float(numbers_LO[np.arange(len(picks)), picks].sum())


def _cheapest(values: FloatArray, costs: FloatArray) -> IndexArray:
    """Per layer the cheapest option, of those the most valuable."""
    reachable = np.where(values > -np.inf, costs, np.inf)
    least = reachable == reachable.min(axis=1, keepdims=True)
    picks: IndexArray = np.where(least, values, -np.inf).argmax(axis=1)
    return picks


def _most_valuable(values: FloatArray, costs: FloatArray) -> IndexArray:
    """Per layer the most valuable option, of those the cheapest."""
    best = values == values.max(axis=1, keepdims=True)
    picks: IndexArray = np.where(best, costs, np.inf).argmin(axis=1)
    return picks


def _relax(
    values: FloatArray, costs: FloatArray, budget: float, below: IndexArray, above: IndexArray
) -> tuple[float, IndexArray]:
    """Price that minimises the Lagrangian bound, and the best choice within the budget seen.

    At price p the best option of a layer maximises value - p * cost. Two choices, `below` and
    `above` the budget, give the price at which they tie; the best choice at that price replaces one
    of them, until there is no better. Any price gives a valid bound, so stopping early is safe.
    """
    value_below, cost_below = _total(values, below), _total(costs, below)
    value_above, cost_above = _total(values, above), _total(costs, above)
    price = 0.0
    for _ in range(_MAX_PRICES):
        price = (value_above - value_below) / (cost_above - cost_below)
        picks = (values - price * costs).argmax(axis=1)
        value, cost = _total(values, picks), _total(costs, picks)
        gain = (value - price * cost) - (value_below - price * cost_below)
        if gain <= _SLACK * (abs(value) + price * cost):
            break
        if cost <= budget:
            below, value_below, cost_below = picks, value, cost
        else:
            value_above, cost_above = value, cost
    return price, below


@dataclass(frozen=True, slots=True)
class _Problem:
    """The knapsack at one price, layers in the order in which they are settled.

    regret: [L,O], profit (value - price * cost) that an option gives up against the best of its
    layer; contested: [L], that of the second best. start: [L], a choice within the budget, and the
    most regret in it. The tails [L+1] belong to the layers from i on: the most they add to a bound,
    value and cost of `start` there, and their lowest cost.
    """

    values: FloatArray
    costs: FloatArray
    budget: float
    price: float
    slack: float
    start: IndexArray
    order: IndexArray
    regret: FloatArray
    contested: FloatArray
    start_regret: float
    tail_bound: FloatArray
    tail_value: FloatArray
    tail_cost: FloatArray
    tail_least: FloatArray


@dataclass(frozen=True, slots=True)
class _States:
    """Choices for the layers settled so far [S]: value and cost, and how each was reached."""

    value: FloatArray
    cost: FloatArray
    bound: FloatArray
    parent: IndexArray
    option: IndexArray

    def take(self, indices: IndexArray) -> _States:
        return _States(
            self.value[indices],
            self.cost[indices],
            self.bound[indices],
            self.parent[indices],
            self.option[indices],
        )


def _problem(
    values: FloatArray, costs: FloatArray, budget: float, price: float, start: IndexArray
) -> _Problem:
    profit = values - price * costs
    regret = profit.max(axis=1, keepdims=True) - profit
    contested = np.sort(regret, axis=1)[:, min(1, regret.shape[1] - 1)]
    order = np.argsort(contested, kind="stable")
    values, costs, profit, start = values[order], costs[order], profit[order], start[order]
    regret, contested = regret[order], contested[order]
    layers, exists = np.arange(len(order)), values > -np.inf
    largest = np.where(exists, np.abs(values), 0.0).max(axis=1).sum()
    return _Problem(
        values=values,
        costs=costs,
        budget=budget,
        price=price,
        slack=_SLACK * (float(largest) + price * budget),
        start=start,
        order=order,
        regret=regret,
        contested=contested,
        start_regret=float(regret[layers, start].max()),
        tail_bound=_tails(profit.max(axis=1)) + price * budget,
        tail_value=_tails(values[layers, start]),
        tail_cost=_tails(costs[layers, start]),
        tail_least=_tails(np.where(exists, costs, np.inf).min(axis=1)),
    )


def _tails(numbers: FloatArray) -> FloatArray:
    """Sum of `numbers[i:]` for every i, and 0.0 for the empty rest."""
    return np.append(np.cumsum(numbers[::-1])[::-1], 0.0)


def _settle(problem: _Problem, state_limit: int) -> Choice:
    """Dynamic programming over the layers; `start` completes every state to a whole choice, so
    that ever better ones are known while the search goes on."""
    nothing = np.zeros(1, dtype=np.intp)
    states = _States(np.zeros(1), np.zeros(1), problem.tail_bound[:1], nothing, nothing)
    history = [states]
    best, reached, dropped = _best_completion(problem, states, 0), (0, 0), -np.inf
    for depth in range(1, len(problem.values) + 1):
        gap = problem.tail_bound[0] - best[0] + problem.slack
        if gap <= 2 * problem.slack or problem.contested[depth - 1] > gap >= problem.start_regret:
            break  # nothing better is left, or only the options that `start` has
        states = _grow(problem, states, depth, gap)
        if len(states.value) > state_limit:
            states, lost = _keep_promising(problem, states, depth, state_limit)
            dropped = max(dropped, lost)
        history.append(states)
        complete = _best_completion(problem, states, depth)
        if complete[:2] > best[:2]:
            best, reached = complete, (depth, complete[2])

    picks = problem.start.copy()
    depth, state = reached
    for layer in range(depth - 1, -1, -1):
        picks[layer] = history[layer + 1].option[state]
        state = int(history[layer + 1].parent[state])
    options = np.empty_like(picks)
    options[problem.order] = picks
    return Choice(options, best[0], -best[1], max(best[0], dropped))


def _grow(problem: _Problem, states: _States, depth: int, gap: float) -> _States:
    """Every state with every option of the next layer, where the bound stays within `gap` of the
    relaxation's."""
    layer = depth - 1
    options = np.flatnonzero(problem.regret[layer] <= gap)
    # One row per option: the rows are sorted by cost, which makes sorting them all cheap.
    value = (states.value + problem.values[layer, options, None]).ravel()
    cost = (states.cost + problem.costs[layer, options, None]).ravel()
    bound = value - problem.price * cost + problem.tail_bound[depth]
    affordable = cost <= problem.budget - problem.tail_least[depth]
    alive = np.flatnonzero((bound >= problem.tail_bound[0] - gap) & affordable)
    alive = alive[_pareto(value[alive], cost[alive])]
    option, parent = np.divmod(alive, len(states.value))
    return _States(value[alive], cost[alive], bound[alive], parent, options[option])


def _pareto(values: FloatArray, costs: FloatArray) -> IndexArray:
    """Indices, by cost, of the entries that are worth more than every cheaper one."""
    by_cost = np.argsort(costs, kind="stable")
    ranked = values[by_cost]
    better = np.ones(len(ranked), dtype=bool)
    better[1:] = ranked[1:] > np.maximum.accumulate(ranked)[:-1]
    kept = by_cost[better]
    # Of two that cost the same, the later is worth more.
    last = np.ones(len(kept), dtype=bool)
    last[:-1] = costs[kept[1:]] > costs[kept[:-1]]
    return kept[last]


def _best_completion(problem: _Problem, states: _States, depth: int) -> tuple[float, float, int]:
    """Value, cost (negated) and state of the best choice that `start` completes within budget."""
    value, cost = states.value + problem.tail_value[depth], states.cost + problem.tail_cost[depth]
    within = np.where(cost <= problem.budget, value, -np.inf)
    state = np.lexsort((cost, -within))[0]
    return float(within[state]), -float(cost[state]), int(state)


def _keep_promising(
    problem: _Problem, states: _States, depth: int, count: int
) -> tuple[_States, float]:
    """The `count` states of highest bound, and the highest bound among the others; equal bounds
    count as better where `start` completes them closer to the budget."""
    level = np.rint(states.bound / problem.slack)
    distance = np.abs(states.cost + problem.tail_cost[depth] - problem.budget)
    ranked = np.lexsort((distance, -level))
    lost = float(states.bound[ranked[count:]].max()) + problem.slack
    return states.take(np.sort(ranked[:count])), lost
