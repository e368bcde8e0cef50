"""compile_plan against every combination of regular layers."""

from __future__ import annotations

import itertools
from functools import reduce

import numpy as np
import pytest
from planning import layer_cost, mask_of, model_shape, regular_masks

from spp_export.common.errors import BudgetError, PlanError
from spp_export.planning import compile_plan
from spp_export.planning.allocate.options import layer_options
from spp_export.planning.allocate.sizes import Candidates, allocate
from spp_export.planning.budget import Budget

SHAPES = [(2, 4, 2), (3, 4, 2), (2, 6, 3), (2, 6, 2), (3, 3, 3), (2, 4, 1), (1, 6, 3)]


def random_case(rng):
    shape = model_shape(*SHAPES[rng.integers(len(SHAPES))], bias=bool(rng.integers(2)))
    size = (shape.num_layers, shape.query_heads)
    scores = (
        rng.integers(-2, 4, size).astype(float) if rng.random() < 0.5 else rng.normal(size=size)
    )
    whitelist = np.argwhere(rng.random(size) < rng.choice([0.0, 0.15, 0.4]))
    return shape, scores, [(int(layer), int(head)) for layer, head in whitelist]


def masks_by_layer(shape, whitelist):
    return [
        regular_masks(shape, [head for at, head in whitelist if at == layer])
        for layer in range(shape.num_layers)
    ]


def all_totals(shape, scores, whitelist, kind):
    """Score and cost of every combination of regular layers, flat."""
    score, cost = [], []
    for layer, masks in enumerate(masks_by_layer(shape, whitelist)):
        score.append(np.array([scores[layer][mask].sum() for mask in masks]))
        cost.append(np.array([layer_cost(shape, mask, kind) for mask in masks]))
    return (reduce(np.add.outer, score).ravel(), reduce(np.add.outer, cost).ravel())


def budget_of(shape, kind, cost):
    """The same limit on head costs, in the user's terms."""
    if kind == "kv-bytes":
        return Budget(max_kv_bytes=int(cost))
    rest = shape.parameters(shape.layers) - shape.head_parameters(shape.layers)
    return Budget(max_params=int(cost) + rest)


def check_layers(layers, realised, shape, scores, whitelist, kind):
    masks = [mask_of(layer, shape) for layer in layers]
    regular = masks_by_layer(shape, whitelist)
    for mask, allowed in zip(masks, regular, strict=True):
        assert any((mask == other).all() for other in allowed)
    assert realised.cost == sum(layer_cost(shape, mask, kind) for mask in masks)
    assert realised.score == pytest.approx(
        sum(row[mask].sum() for row, mask in zip(scores, masks, strict=True))
    )


@pytest.mark.parametrize("kind", ["parameters", "kv-bytes"])
def test_per_layer_is_optimal_at_every_budget(kind):
    rng = np.random.default_rng(11)
    for _ in range(80):
        shape, scores, whitelist = random_case(rng)
        all_scores, all_costs = all_totals(shape, scores, whitelist, kind)
        for limit in np.unique(all_costs):
            budget = budget_of(shape, kind, limit + rng.integers(3))
            layers, realised = compile_plan(scores, shape, budget, whitelist=whitelist)
            check_layers(layers, realised, shape, scores, whitelist, kind)
            within = all_costs <= realised.limit
            best = all_scores[within].max()
            assert realised.score == pytest.approx(best, abs=1e-12)
            assert realised.score_bound == realised.score
            assert realised.cost <= realised.limit
            if (scores == np.rint(scores)).all():
                assert realised.cost == all_costs[within & (all_scores == best)].min()
        budget = budget_of(shape, kind, all_costs.min() - 1)
        with pytest.raises(BudgetError):
            compile_plan(scores, shape, budget, whitelist=whitelist)


def test_a_large_model_is_optimal_too():
    # Without biases a query head costs as much as a KV head: costs are small whole numbers.
    shape = model_shape(48, 40, 8, hidden_size=5, head_dim=1)
    scores = np.random.default_rng(15).gamma(2.0, size=(48, 40))
    ordered = -np.sort(-scores.reshape(48, 8, 5), axis=2)
    best = np.cumsum(ordered, axis=2)
    best = np.cumsum(-np.sort(-best, axis=1), axis=1)
    table = np.zeros(48 * 48 + 1)
    for layer in best:
        grown = np.full_like(table, -np.inf)
        for groups, heads in itertools.product(range(1, 9), range(1, 6)):
            price = groups * (heads + 1)
            reached = table[:-price] + layer[groups - 1, heads - 1]
            np.maximum(grown[price:], reached, out=grown[price:])
        table = grown
    for keep in (0.9, 0.7, 0.5, 0.2):
        _, realised = compile_plan(scores, shape, Budget(keep=keep))
        assert realised.score == pytest.approx(table[int(keep * 48 * 48)], rel=1e-12)


def test_a_table_of_float_costs_per_layer():
    rng = np.random.default_rng(16)
    shape = model_shape(3, 6, 3)
    options = layer_options(rng.normal(size=(3, 6)), shape)
    latency = rng.random((3, 3, 2)) + 0.1
    values = reduce(np.add.outer, options.value.reshape(3, 6)).ravel()
    costs = reduce(np.add.outer, latency.reshape(3, 6)).ravel()
    for budget in costs:
        _, choice = allocate([Candidates.of_heads(options, latency)], budget)
        assert choice.value == pytest.approx(values[costs <= budget * (1 + 1e-13)].max())


def uniform_totals(shape, scores, whitelist, accepts, kind):
    """Best score and cost of every uniform size (groups, heads per group), by enumeration."""
    totals = {}
    for groups, heads in itertools.product(
        range(1, shape.kv_heads + 1), range(1, shape.group_size + 1)
    ):
        best = 0.0
        for row, masks in zip(scores, masks_by_layer(shape, whitelist), strict=True):
            sized = [
                mask
                for mask in masks
                if mask.sum() == groups * heads
                and mask.reshape(shape.kv_heads, -1).any(axis=1).sum() == groups
            ]
            best += max((row[mask].sum() for mask in sized), default=-np.inf)
        if best > -np.inf and accepts(groups * heads):
            example = np.zeros((shape.kv_heads, shape.group_size), dtype=bool)
            example[:groups, :heads] = True
            cost = shape.num_layers * layer_cost(shape, example.ravel(), kind)
            totals[groups, heads] = (best, cost)
    return totals


@pytest.mark.parametrize("kind", ["parameters", "kv-bytes"])
@pytest.mark.parametrize("accepts", [lambda n: True, lambda n: n % 2 == 0], ids=["any", "even"])
def test_uniform_is_optimal_at_every_budget(kind, accepts):
    rng = np.random.default_rng(12)
    for _ in range(80):
        shape, scores, whitelist = random_case(rng)
        totals = uniform_totals(shape, scores, whitelist, accepts, kind)
        limits = sorted({cost for _, cost in totals.values()})
        for limit in limits:
            budget = budget_of(shape, kind, limit)
            layers, realised = compile_plan(scores, shape, budget, "uniform", whitelist, accepts)
            check_layers(layers, realised, shape, scores, whitelist, kind)
            assert len({layer.shape(shape) for layer in layers}) == 1
            best = max(score for score, cost in totals.values() if cost <= limit)
            assert realised.score == pytest.approx(best, abs=1e-12)
            accepted = {groups * heads for groups, heads in totals}
            assert realised.accepted_query_heads == tuple(sorted(accepted))
            above = {
                (groups * heads, groups): cost
                for (groups, heads), (_, cost) in totals.items()
                if cost > limit
            }
            if above:
                assert above[realised.next_larger] == min(above.values())
            else:
                assert realised.next_larger is None
        budget = budget_of(shape, kind, min(limits, default=10**9) - 1)
        with pytest.raises(BudgetError, match=r"uniform plan|accepts no size"):
            compile_plan(scores, shape, budget, "uniform", whitelist, accepts)


def test_ties_go_to_the_lowest_index():
    shape = model_shape(2, 6, 3)
    layers, _ = compile_plan(np.ones((2, 6)), shape, Budget(max_kv_bytes=2 * 2 * 3 * 2))
    assert [layer.kv_heads for layer in layers] == [(0,), (0,)]
    assert [layer.query_heads for layer in layers] == [(0, 1), (0, 1)]


def test_keep_is_a_share_in_decimals():
    # 0.57 * 100 is below 57 in floats; head parameters here are 100 times something.
    shape = model_shape(10, 10, 10, hidden_size=8, head_dim=1)
    assert Budget(keep=0.57).limit(shape).cost * 100 == 57 * shape.head_parameters(shape.layers)


def test_realised_figures():
    shape = model_shape(2, 4, 2, bias=True)
    layers, realised = compile_plan(np.eye(2, 4), shape, Budget(keep=0.5))
    shapes = [layer.shape(shape) for layer in layers]
    assert realised.parameters == shape.parameters(shapes)
    assert realised.kv_bytes_per_token == shape.kv_bytes_per_token(shapes)
    assert realised.keep == shape.head_parameters(shapes) / shape.head_parameters(shape.layers)
    assert realised.keep <= 0.5
    assert realised.dense_score == 2.0
    assert "next_larger" not in realised.to_dict()


def test_strength_keeps_more_for_broad_scenarios():
    shape = model_shape(3, 6, 3)
    scores = np.random.default_rng(13).random((3, 6))
    narrow, broad = (
        compile_plan(scores, shape, Budget(strength=0.6), breadth=breadth)[1]
        for breadth in (0.1, 0.9)
    )
    assert narrow.keep < broad.keep
    assert narrow.limit == int((0.1 + 0.9 * (1 - 0.6 * 0.9)) * shape.head_parameters(shape.layers))


SMALL = model_shape(2, 6, 3)  # 9 units of 48 parameters per layer: 6 query heads, 3 KV heads
SMALLEST = "(one KV group per layer, and the whitelist)"


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            Budget(keep=0.1),
            "budget keep 0.1 is below the smallest plan, 0.2223 of the head parameters "
            f"{SMALLEST}. Ask for keep 0.2223 or more.",
        ),
        (
            Budget(max_kv_bytes=10),
            "budget max_kv_bytes 10 is below the smallest plan, 24 bytes of KV cache per token "
            f"{SMALLEST}. Ask for max_kv_bytes 24 or more.",
        ),
        (
            Budget(max_params=600),
            f"budget max_params 600 is below the smallest plan, 800 parameters {SMALLEST}. "
            "Ask for max_params 800 or more.",
        ),
    ],
)
def test_infeasible_budget_names_the_smallest_that_can_be_met(budget, message):
    with pytest.raises(BudgetError) as caught:
        compile_plan(np.ones((2, 6)), SMALL, budget)
    assert str(caught.value) == message


def test_infeasible_uniform_names_the_nearest_on_both_sides():
    whitelist = [(0, 0), (0, 1), (0, 4), (1, 2)]
    with pytest.raises(BudgetError) as caught:
        compile_plan(
            np.ones((2, 6)), SMALL, Budget(keep=0.67), "uniform", whitelist, lambda n: n % 3 == 0
        )
    assert str(caught.value) == (
        "budget keep 0.67 is below the smallest uniform plan (6 query heads in 3 KV groups, "
        "1.0000 of the head parameters); the next below (3 query heads in 3 KV groups, 0.6667 of "
        "the head parameters) drops whitelisted heads. The stock config accepts 3, 6 query heads. "
        "Ask for keep 1.0 or more."
    )


def test_the_smallest_budget_named_is_met():
    rng = np.random.default_rng(14)
    for _ in range(40):
        shape, scores, whitelist = random_case(rng)
        with pytest.raises(BudgetError) as caught:
            compile_plan(scores, shape, Budget(keep=1e-6), whitelist=whitelist)
        keep = float(str(caught.value).split("Ask for keep ")[1].split()[0])
        compile_plan(scores, shape, Budget(keep=keep), whitelist=whitelist)


def test_strength_that_is_too_high_says_so():
    with pytest.raises(BudgetError, match=r"strength 1.0 \(keep 0.1000\).*Lower the strength"):
        compile_plan(np.ones((2, 6)), SMALL, Budget(strength=1.0), breadth=0.0)


@pytest.mark.parametrize(
    ("scores", "whitelist", "message"),
    [
        (np.ones((2, 5)), [], r"scores have shape \[2, 5\] but the model needs \[2, 6\]"),
        (np.full((2, 6), np.nan), [], "layer 0: the score of query head 0 is nan"),
        (np.array([[1.0] * 6, [1.0] * 5 + [np.inf]]), [], "layer 1: the score of query head 5 is"),
        (np.ones((2, 6)), [(1, 6)], "layer 1: the whitelist holds query head 6"),
        (np.ones((2, 6)), [(-1, 0)], "layer -1: the whitelist holds query head 0"),
    ],
)
def test_scores_of_another_model_are_refused(scores, whitelist, message):
    with pytest.raises(PlanError, match=message):
        compile_plan(scores, SMALL, Budget(keep=1), whitelist=whitelist)
