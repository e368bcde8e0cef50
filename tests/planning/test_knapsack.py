"""The knapsack against every combination of options."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from spp_export.common.errors import BudgetError
from spp_export.planning.knapsack import choose, on_grid


def every_combination(values, costs):
    """Value and cost of every choice of one option per layer, by enumeration."""
    picks = [
        combination
        for combination in itertools.product(range(values.shape[1]), repeat=len(values))
        if all(values[layer, option] > -np.inf for layer, option in enumerate(combination))
    ]
    layers = np.arange(len(values))
    return (
        np.array([values[layers, list(pick)].sum() for pick in picks]),
        np.array([costs[layers, list(pick)].sum() for pick in picks]),
    )


def random_case(rng, kind):
    layers, options = int(rng.integers(1, 5)), int(rng.integers(1, 6))
    size = (layers, options)
    if kind == "ties":
        values, costs = rng.integers(-3, 4, size).astype(float), rng.integers(1, 6, size)
    elif kind == "floats":
        values, costs = rng.normal(size=size), rng.random(size) + 0.01
    elif kind == "proportional":
        costs = rng.integers(1, 50, size)
        values = costs.astype(float)
    else:
        values, costs = rng.normal(size=size) * 1e-7, rng.integers(10**8, 10**9, size)
    values[:, 1:][rng.random((layers, options - 1)) < 0.2] = -np.inf
    return values, costs


@pytest.mark.parametrize("kind", ["ties", "floats", "proportional", "large"])
def test_optimum_and_lowest_cost_at_every_budget(kind):
    rng = np.random.default_rng(1)
    for _ in range(60):
        values, costs = random_case(rng, kind)
        all_values, all_costs = every_combination(values, costs)
        budgets = np.unique(all_costs)
        for budget in rng.choice(budgets, size=min(15, len(budgets)), replace=False):
            within = all_costs <= budget * (1 + 1e-13)
            best = all_values[within].max()
            cheapest = all_costs[within & (all_values == best)].min()
            choice = choose(values, costs, budget)
            layers = np.arange(len(values))
            assert choice.exact
            assert choice.value == pytest.approx(best, rel=1e-12, abs=1e-12 * np.ptp(all_values))
            assert choice.value == pytest.approx(values[layers, choice.options].sum())
            assert choice.cost == pytest.approx(costs[layers, choice.options].sum())
            if kind in ("ties", "proportional"):
                assert (choice.value, choice.cost) == (best, cheapest)


def best_value_and_cost(values, costs, budget):
    """The textbook dynamic programme over every integer cost up to the budget."""
    table = np.zeros(budget + 1)
    for row, prices in zip(values, costs, strict=True):
        grown = np.full(budget + 1, -np.inf)
        for value, price in zip(row, prices, strict=True):
            np.maximum(grown[price:], table[: budget + 1 - price] + value, out=grown[price:])
        table = grown
    # table[c] is the most value at a cost of at most c.
    return table[budget], int(np.flatnonzero(table == table[budget])[0])


@pytest.mark.parametrize("whole", [True, False], ids=["ties", "floats"])
def test_many_layers_against_the_textbook(whole):
    rng = np.random.default_rng(6)
    for _ in range(40):
        layers, options = int(rng.integers(10, 50)), int(rng.integers(2, 30))
        costs = np.sort(rng.integers(1, 40, (layers, options)), axis=1)
        values = np.sort(rng.gamma(1.0, size=costs.shape), axis=1)
        if whole:
            values = np.rint(20 * values)
        low, high = costs.min(axis=1).sum(), costs.max(axis=1).sum()
        budget = int(rng.integers(low, high + 1))
        value, cost = best_value_and_cost(values, costs, budget)
        choice = choose(values, costs, budget)
        assert choice.exact
        assert choice.value == pytest.approx(value, rel=1e-13)
        if whole:
            assert (choice.value, choice.cost) == (value, cost)


def integer_programme(values, costs, budget):
    """The most value, by a general solver: one option of every layer, all within the budget."""
    layers, options = values.shape
    one_of_each = LinearConstraint(np.kron(np.eye(layers), np.ones(options)), 1, 1)
    affordable = LinearConstraint(costs.reshape(1, -1) / budget, ub=1)
    result = milp(
        -values.ravel(),
        integrality=np.ones(values.size),
        bounds=Bounds(0, 1),
        constraints=[one_of_each, affordable],
        options={"mip_rel_gap": 0},
    )
    assert result.success
    return -result.fun


def test_sizes_of_real_models_against_an_integer_programme():
    """Parameters of 30 layers are too many for a table over every cost."""
    rng = np.random.default_rng(7)
    for _ in range(12):
        options = int(rng.integers(4, 12))
        costs = np.cumsum(rng.integers(10**5, 10**6, (30, options)), axis=1)
        values = np.cumsum(rng.gamma(0.5, size=costs.shape), axis=1)
        low, high = costs.min(axis=1).sum(), costs.max(axis=1).sum()
        budget = int(rng.integers(low, high + 1))
        choice = choose(values, costs, budget)
        assert choice.exact
        assert choice.cost <= budget
        # The solver's own tolerance is 1e-6 on the constraints and on whole numbers.
        assert choice.value == pytest.approx(integer_programme(values, costs, budget), rel=1e-6)


def test_below_the_cheapest_options_is_an_error():
    values, costs = np.array([[1.0, 2.0], [-np.inf, 3.0]]), np.array([[1, 2], [1, 5]])
    assert choose(values, costs, 6).options.tolist() == [0, 1]
    with pytest.raises(BudgetError, match="budget 5 is below the smallest total cost 6"):
        choose(values, costs, 5)


def test_costs_of_one_row_hold_for_every_layer():
    values = np.random.default_rng(2).random((6, 4))
    costs = np.array([2, 3, 5, 9])
    expected = choose(values, np.tile(costs, (6, 1)), 25)
    assert choose(values, costs, 25).options.tolist() == expected.options.tolist()


def test_float_costs_that_should_sum_to_the_budget_do():
    # 0.1 + 0.1 + 0.1 > 0.3 in floats, and 0.7 + 0.1 < 0.8.
    values = np.array([[1.0, 2.0]] * 3)
    choice = choose(values, np.array([[0.05, 0.1]] * 3), 0.3)
    assert choice.options.tolist() == [1, 1, 1]


def test_same_inputs_same_choice():
    rng = np.random.default_rng(3)
    values, costs = rng.integers(0, 4, (20, 12)).astype(float), rng.integers(1, 9, (20, 12))
    first = choose(values, costs, 60).options.tolist()
    assert all(choose(values.copy(), costs.copy(), 60).options.tolist() == first for _ in range(3))


def test_few_states_still_give_a_proven_bound():
    rng = np.random.default_rng(4)
    values = rng.random((5, 5))
    costs = values + 0.01 * rng.random((5, 5))
    all_values, all_costs = every_combination(values, costs)
    open_cases = 0
    for budget in np.quantile(all_costs, np.linspace(0.05, 0.95, 40)):
        best = all_values[all_costs <= budget].max()
        choice = choose(values, costs, budget, state_limit=2)
        assert choice.value <= best + 1e-12 <= choice.bound + 2e-12
        assert choice.cost <= budget
        open_cases += not choice.exact
    assert open_cases > 0


def test_sums_on_the_grid_do_not_depend_on_order():
    rng = np.random.default_rng(5)
    numbers = on_grid(rng.normal(size=1000) * 10.0 ** rng.integers(-6, 7, 1000), 1000)
    assert len({rng.permutation(numbers).sum() for _ in range(20)}) == 1
    whole = np.array([3.0, -7.0, 123456.0, -np.inf])
    assert on_grid(whole, 4).tolist() == whole.tolist()
