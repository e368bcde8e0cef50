"""Ragged plans against every set of query heads of every layer."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
from planning import layer_cost, mask_of, model_shape, ragged_masks

from spp_export.common.errors import BudgetError, PlanError
from spp_export.planning import (
    FILL,
    LayerPlan,
    Plan,
    compile_plan,
    compile_units,
    exactly,
    parse_plan,
    validate_plan,
)
from spp_export.planning.allocate.options import SetOptions, ragged_options
from spp_export.planning.budget import Budget

SHAPES = [(2, 4, 2), (2, 6, 2), (2, 6, 3), (3, 4, 2), (3, 3, 3), (2, 4, 1), (1, 8, 4)]
SMALL = model_shape(2, 6, 3)


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
        ragged_masks(shape, [head for at, head in whitelist if at == layer])
        for layer in range(shape.num_layers)
    ]


def all_totals(shape, scores, whitelist, kind):
    """Score and cost of every combination of layers, flat."""
    score, cost = [], []
    for layer, masks in enumerate(masks_by_layer(shape, whitelist)):
        score.append(np.array([scores[layer][mask].sum() for mask in masks]))
        cost.append(np.array([layer_cost(shape, mask, kind) for mask in masks]))
    return reduce(np.add.outer, score).ravel(), reduce(np.add.outer, cost).ravel()


def budget_of(shape, kind, cost):
    """The same limit on head costs, in the user's terms."""
    if kind == "kv-bytes":
        return Budget(max_kv_bytes=int(cost))
    rest = shape.parameters(shape.layers) - shape.head_parameters(shape.layers)
    return Budget(max_params=int(cost) + rest)


@pytest.mark.parametrize("kind", ["parameters", "kv-bytes"])
def test_no_set_of_heads_keeps_more_score_at_any_budget(kind):
    rng = np.random.default_rng(41)
    for _ in range(40):
        shape, scores, whitelist = random_case(rng)
        all_scores, all_costs = all_totals(shape, scores, whitelist, kind)
        for limit in np.unique(all_costs):
            budget = budget_of(shape, kind, limit + rng.integers(3))
            layers, realised = compile_plan(scores, shape, budget, "ragged", whitelist)
            masks = [mask_of(layer, shape) for layer in layers]
            assert all(masks[layer][head] for layer, head in whitelist)
            assert realised.cost == sum(layer_cost(shape, mask, kind) for mask in masks)
            kept = sum(row[mask].sum() for row, mask in zip(scores, masks, strict=True))
            assert realised.score == pytest.approx(kept)
            within = all_costs <= realised.limit
            best = all_scores[within].max()
            assert realised.score == pytest.approx(best, abs=1e-12)
            assert realised.score_bound == realised.score
            if (scores == np.rint(scores)).all():
                assert realised.cost == all_costs[within & (all_scores == best)].min()
            shapes = [layer.shape(shape) for layer in layers]
            assert realised.parameters == shape.parameters(shapes)
        with pytest.raises(BudgetError):
            compile_plan(
                scores, shape, budget_of(shape, kind, all_costs.min() - 1), "ragged", whitelist
            )


def test_every_size_has_its_best_set():
    rng = np.random.default_rng(42)
    for _ in range(40):
        shape, scores, whitelist = random_case(rng)
        forced = np.zeros(scores.shape, dtype=bool)
        for layer, head in whitelist:
            forced[layer, head] = True
        options = ragged_options(scores, shape, forced)
        for layer, masks in enumerate(masks_by_layer(shape, whitelist)):
            best = np.full(options.value.shape[1:], -np.inf)
            for mask in masks:
                groups = mask.reshape(shape.kv_heads, -1).any(axis=1).sum()
                at = groups - 1, mask.sum() - 1
                best[at] = max(best[at], scores[layer][mask].sum())
            np.testing.assert_allclose(options.value[layer], best, atol=1e-12)
        for a, q in np.argwhere(options.value.max(axis=0) > -np.inf):
            kept = options.kept(a + 1, q + 1)
            for layer in np.flatnonzero(options.value[:, a, q] > -np.inf):
                assert (kept[layer].any(axis=1).sum(), kept[layer].sum()) == (a + 1, q + 1)
                total = scores[layer][kept[layer].ravel()].sum()
                assert total == pytest.approx(options.value[layer, a, q])


def test_no_regular_plan_keeps_more():
    rng = np.random.default_rng(43)
    for _ in range(20):
        shape, scores, whitelist = random_case(rng)
        for keep in (1.0, 0.9, 0.7):
            try:
                _, regular = compile_plan(scores, shape, Budget(keep=keep), "per-layer", whitelist)
            except BudgetError:
                continue
            _, ragged = compile_plan(scores, shape, Budget(keep=keep), "ragged", whitelist)
            assert ragged.score >= regular.score - 1e-12


def test_a_table_of_losses_is_taken_as_it_is():
    """One layer whose only way below the dense size is a set that no sum of scores would choose."""
    shape = model_shape(1, 4, 2)
    value = np.full((1, 2, 4), -np.inf)
    sets = np.zeros((1, 2, 4, 2, 2), dtype=bool)
    value[0, 1, 3], sets[0, 1, 3] = 0.0, True
    value[0, 1, 2], sets[0, 1, 2] = -1.0, [[False, True], [True, True]]
    layers, realised = compile_units(
        SetOptions(value, sets, ragged=True), None, shape, Budget(keep=0.9), "ragged"
    )
    assert layers == (LayerPlan((0, 1), (1, 2, 3)),)
    assert (realised.score, realised.dense_score) == (-1.0, 0.0)


def test_a_published_mask_is_taken_as_it_is():
    mask = np.array([[1, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=bool)
    layers = exactly(mask, SMALL, np.arange(12.0).reshape(2, 6))
    assert layers == (LayerPlan((0, 1, 2), (0, 3, 4, 5)), LayerPlan((2,), (5,)))


def test_only_ragged_plans_may_hold_ragged_layers():
    layer = LayerPlan((0, 2), (0, 4, 5), None)
    validate_plan(Plan("f", "m", "ragged", "none", (layer, layer)), SMALL, "f")
    with pytest.raises(PlanError, match="or use layout ragged"):
        validate_plan(Plan("f", "m", "per-layer", "none", (layer, layer)), SMALL, "f")
    empty = LayerPlan((0, 1, 2), (0, 4, 5), None)
    with pytest.raises(PlanError, match="keeps KV group 1 but none of its query heads"):
        validate_plan(Plan("f", "m", "ragged", "none", (layer, empty)), SMALL, "f")


def test_padding_fills_every_group_to_the_largest():
    layer = LayerPlan((0, 1, 3), (1, 3, 4, 5, 10, 11))
    shape = model_shape(1, 12, 4)
    sliced = layer.shape(shape)
    assert (sliced.query_heads, sliced.kv_heads, sliced.groups) == (6, 3, (1, 3, 2))
    assert not sliced.regular
    assert (sliced.padded.query_heads, sliced.padded.kv_heads) == (9, 3)
    assert sliced.padded.regular
    assert layer.padded_heads(3) == (1, FILL, FILL, 3, 4, 5, 10, 11, FILL)
    even = LayerPlan((0, 3), (0, 1, 10, 11))
    assert even.padded_heads(3) == even.query_heads
    assert even.shape(shape).padded == even.shape(shape)


def test_a_padded_plan_says_so_and_is_regular():
    layer = LayerPlan((0, 2), (0, 4, 5), None)
    plan = Plan("f", "m", "ragged", "none", (layer, layer))
    assert '"padded"' not in plan.to_json()
    assert plan.written_shapes(SMALL) == plan.layer_shapes(SMALL)
    padded = replace(plan, padded=True)
    assert '\n  "layout": "ragged",\n  "padded": true,\n' in padded.to_json()
    assert parse_plan(padded.to_json()) == padded
    assert {shape.query_heads for shape in padded.written_shapes(SMALL)} == {4}
    assert (plan.written_layout, padded.written_layout) == ("ragged", "per-layer")
