"""compile_units against every combination of regular attention and MLP widths."""

from __future__ import annotations

import itertools
from functools import reduce

import numpy as np
import pytest
from planning import layer_cost, mask_of, model_shape, regular_masks

from spp_export.common.errors import BudgetError
from spp_export.models.shape import ModelShape
from spp_export.planning import compile_plan, compile_units, forced_heads
from spp_export.planning.allocate.options import (
    NestedOptions,
    channel_options,
    layer_options,
    per_parameter,
)
from spp_export.planning.budget import Budget

UNITS = ["channels", "both"]
CASES = [(2, 4, 2, 6, 2), (2, 2, 2, 7, 3), (1, 4, 1, 5, 8), (3, 2, 1, 4, 2)]


class Case:
    """Random scores of a tiny model, and every plan there is for it."""

    def __init__(self, rng, units):
        layers, query, kv, channels, self.multiple = CASES[rng.integers(len(CASES))]
        self.units = units
        self.shape = model_shape(layers, query, kv, bias=bool(rng.integers(2)), channels=channels)
        sizes = ((layers, query), (layers, channels))
        whole = rng.random() < 0.5
        self.head_scores, self.channel_scores = (
            rng.integers(-1, 4, size).astype(float) if whole else rng.normal(1, 1, size)
            for size in sizes
        )
        some = np.argwhere(rng.random(sizes[0]) < rng.choice([0.0, 0.3]))
        self.whitelist = [(int(layer), int(head)) for layer, head in some]

    @property
    def heads(self):
        forced = forced_heads(self.whitelist, self.shape)
        scores = self.head_scores
        return layer_options(scores, self.shape, forced) if self.units == "both" else None

    @property
    def channels(self):
        return channel_options(self.channel_scores, self.shape, self.multiple)

    def compile(self, cost, *arguments):
        return compile_units(self.heads, self.channels, self.shape, self.budget(cost), *arguments)

    def budget(self, cost):
        """The same limit in the user's terms."""
        of = self.shape
        rest = of.parameters(of.layers) - of.channels * of.num_layers * of.channel_parameters
        if self.units == "both":
            rest -= of.head_parameters(of.layers)
        return Budget(max_params=int(cost) + rest, units=self.units)

    def layer_heads(self, layer):
        """(size, score, cost) of every regular set of heads of a layer."""
        if self.units == "channels":
            return [((self.shape.query_heads, self.shape.kv_heads), 0.0, 0)]
        masks = regular_masks(self.shape, [head for at, head in self.whitelist if at == layer])
        return [
            (
                (int(mask.sum()), int(mask.reshape(self.shape.kv_heads, -1).any(axis=1).sum())),
                self.head_scores[layer][mask].sum(),
                layer_cost(self.shape, mask, "parameters"),
            )
            for mask in masks
        ]

    def layer_widths(self, layer):
        """(width, score, cost) of every allowed width."""
        each = 3 * self.shape.hidden_size
        ordered = np.sort(self.channel_scores[layer])[::-1]
        widths = [w for w in range(1, len(ordered)) if w % self.multiple == 0] + [len(ordered)]
        return [(width, ordered[:width].sum(), width * each) for width in widths]

    def totals(self):
        """Score and cost of every plan, flat."""
        score, cost = [], []
        for layer in range(self.shape.num_layers):
            for options in (self.layer_heads(layer), self.layer_widths(layer)):
                score.append(np.array([entry[1] for entry in options]))
                cost.append(np.array([entry[2] for entry in options]))
        return reduce(np.add.outer, score).ravel(), reduce(np.add.outer, cost).ravel()

    def uniform_totals(self, accepts):
        """Best score and the cost of every (query heads, KV heads, width) of all layers."""
        totals = {}
        for layer in range(self.shape.num_layers):
            best = {}
            for heads, channels in itertools.product(
                self.layer_heads(layer), self.layer_widths(layer)
            ):
                size = (*heads[0], channels[0])
                entry = (heads[1] + channels[1], heads[2] + channels[2])
                best[size] = max(best.get(size, entry), entry)
            totals = {
                size: (entry[0] + totals[size][0], entry[1] + totals[size][1]) if layer else entry
                for size, entry in best.items()
                if (not layer or size in totals) and (self.units != "both" or accepts(size[0]))
            }
        return totals

    def check(self, layers, realised):
        """What was compiled is regular, and scores and costs what it says."""
        score = cost = 0.0
        for layer, plan in enumerate(layers):
            mask = mask_of(plan, self.shape)
            kept = range(self.shape.channels) if plan.channels is None else plan.channels
            assert plan.channels is None or len(plan.channels) < self.shape.channels
            assert list(kept) == sorted(set(kept))
            assert len(kept) in [entry[0] for entry in self.layer_widths(layer)]
            score += self.channel_scores[layer][list(kept)].sum()
            cost += 3 * self.shape.hidden_size * len(kept)
            if self.units == "channels":
                assert mask.all()
            else:
                assert all(mask[head] for at, head in self.whitelist if at == layer)
                score += self.head_scores[layer][mask].sum()
                cost += layer_cost(self.shape, mask, "parameters")
        assert realised.cost == cost <= realised.limit
        assert realised.score == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize("units", UNITS)
def test_per_layer_is_optimal(units):
    rng = np.random.default_rng(21)
    for _ in range(40):
        case = Case(rng, units)
        scores, costs = case.totals()
        limits = np.unique(costs)
        for limit in rng.choice(limits, min(8, len(limits)), replace=False):
            layers, realised = case.compile(limit)
            case.check(layers, realised)
            assert realised.score == pytest.approx(scores[costs <= limit].max(), abs=1e-12)
            assert realised.score_bound == realised.score
        with pytest.raises(BudgetError, match="is below the smallest plan"):
            case.compile(costs.min() - 1)


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("accepts", [lambda n: True, lambda n: n % 2 == 0], ids=["any", "even"])
def test_uniform_is_optimal(units, accepts):
    rng = np.random.default_rng(22)
    for _ in range(40):
        case = Case(rng, units)
        totals = case.uniform_totals(accepts)
        for limit in sorted({cost for _, cost in totals.values()}):
            layers, realised = case.compile(limit, "uniform", accepts)
            case.check(layers, realised)
            assert len({layer.shape(case.shape) for layer in layers}) == 1
            best = max(score for score, cost in totals.values() if cost <= limit)
            assert realised.score == pytest.approx(best, abs=1e-12)
            above = {size: cost for size, (_, cost) in totals.items() if cost > limit}
            assert (realised.next_larger_channels is None) == (not above)
            if above:
                heads = realised.next_larger or (case.shape.query_heads, case.shape.kv_heads)
                assert above[*heads, realised.next_larger_channels] == min(above.values())
            if units == "both":
                assert realised.accepted_query_heads == tuple(sorted({key[0] for key in totals}))
            else:
                assert realised.accepted_query_heads is realised.next_larger is None
        smallest = min((cost for _, cost in totals.values()), default=10**9)
        with pytest.raises(BudgetError, match=r"uniform plan|accepts no size"):
            case.compile(smallest - 1, "uniform", accepts)


def one_price(layers=3):
    """A model whose heads, and fours of channels, all have 96 parameters."""
    shape = model_shape(layers, 5, 5, hidden_size=8, head_dim=3, channels=20)
    assert shape.query_head_parameters + shape.kv_head_parameters == 96
    assert 4 * shape.channel_parameters == 96
    return shape


def test_a_number_added_to_all_scores_changes_nothing():
    shape, rng = one_price(), np.random.default_rng(23)
    for keep in (0.25, 0.4, 0.6, 0.9):
        heads, channels = rng.random((3, 5)), rng.random((3, 20))
        budget = Budget(keep=keep, units="both")
        plans = []
        for added in (0.0, 1.0, 64.0):
            options = (
                layer_options(per_parameter(heads + added, 96), shape),
                channel_options(per_parameter(channels + added, 24), shape, 4),
            )
            layers, realised = compile_units(*options, shape, budget)
            assert realised.limit - realised.cost < 96
            plans.append(layers)
        assert plans[0] == plans[1] == plans[2]


def test_units_of_one_score_stay_by_one_threshold():
    # Channels in fours of one score each, so that heads and fours are all units of one price.
    shape, rng = one_price(), np.random.default_rng(24)
    heads, fours = rng.random((3, 5)), rng.random((3, 5))
    options = (
        layer_options(per_parameter(heads, 96), shape),
        channel_options(per_parameter(np.repeat(fours, 4, axis=1), 24), shape, 4),
    )
    layers, _ = compile_units(*options, shape, Budget(keep=0.6, units="both"))
    pooled = np.sort(np.concatenate([heads, fours]).ravel())
    threshold = pooled[len(pooled) * 4 // 10]
    for layer, plan in enumerate(layers):
        assert plan.query_heads == tuple(np.flatnonzero(heads[layer] >= threshold).tolist())
        kept = np.flatnonzero(np.repeat(fours[layer] >= threshold, 4)).tolist()
        assert plan.channels == tuple(kept)


def test_no_plan_for_both_is_worse_than_one_for_either():
    rng = np.random.default_rng(25)
    for _ in range(10):
        case = Case(rng, "both")
        shape, heads, channels = case.shape, case.heads, case.channels
        limit = int(0.9 * shape.parameters(shape.layers))
        budgets = [Budget(max_params=limit, units=units) for units in ("heads", *UNITS)]
        pairs, scores = [(heads, None), (None, channels), (heads, channels)], []
        for budget, given in zip(budgets, pairs, strict=True):
            try:
                _, realised = compile_units(*given, shape, budget)
            except BudgetError:
                continue
            dense = 0.0 if given[0] else heads.value[:, -1, -1].sum()
            dense += 0.0 if given[1] else channels.value[:, -1].sum()
            assert realised.parameters <= limit
            scores.append(realised.score + dense)
        assert scores[-1] >= max(scores) - 1e-9


def test_heads_alone_are_as_before():
    shape = model_shape(3, 6, 3)
    scores = np.random.default_rng(26).random((3, 6))
    layers, realised = compile_units(layer_options(scores, shape), None, shape, Budget(keep=0.6))
    assert (layers, realised) == compile_plan(scores, shape, Budget(keep=0.6))
    assert all(layer.channels is None for layer in layers)
    record = realised.to_dict()
    assert not {"units", "head_keep", "channel_keep", "next_larger_channels"} & set(record)


@pytest.mark.parametrize("units", UNITS)
def test_realised_figures(units):
    case = Case(np.random.default_rng(27), units)
    shape = case.shape
    budget = Budget(keep=0.7, units=units)
    layers, realised = compile_units(case.heads, case.channels, shape, budget)
    shapes = [layer.shape(shape) for layer in layers]
    heads, channels = (
        [shape.head_parameters(of), sum(at.channels for at in of) * 3 * shape.hidden_size]
        for of in (shapes, shape.layers)
    )
    kept, dense = heads, channels
    assert realised.parameters == shape.parameters(shapes)
    assert realised.kv_bytes_per_token == shape.kv_bytes_per_token(shapes)
    assert realised.head_keep == kept[0] / dense[0]
    assert realised.channel_keep == kept[1] / dense[1]
    own = slice(1, 2) if units == "channels" else slice(0, 2)
    assert realised.keep == sum(kept[own]) / sum(dense[own]) <= 0.7
    assert (realised.kind, realised.units) == ("parameters", units)
    assert realised.to_dict()["units"] == units


def test_losses_given_per_width():
    shape = model_shape(2, channels=6)
    value = np.array([[-5.0, -1.0, 0.0], [-2.0, -1.5, 0.0]])
    rank = np.array([[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]])
    options = NestedOptions((2, 4, 6), value, rank)
    layers, realised = compile_units(
        None, options, shape, Budget(keep=0.5, units="channels"), "per-layer"
    )
    assert [layer.channels for layer in layers] == [(2, 3, 4, 5), (0, 1)]
    assert (realised.score, realised.dense_score) == (-3.0, 0.0)


def test_strength_of_channels():
    shape = model_shape(2, channels=100)
    options = channel_options(np.random.default_rng(28).random((2, 100)), shape, 1)
    budget = Budget(strength=0.5, units="channels")
    _, realised = compile_units(None, options, shape, budget, breadth=0.2)
    assert realised.keep == pytest.approx(0.1 + 0.9 * 0.6, abs=0.01)


SMALL = model_shape(2, 6, 3, channels=20)


def small_options(whitelist=()):
    forced = forced_heads(whitelist, SMALL)
    ones = np.ones((2, 6))
    return layer_options(ones, SMALL, forced), channel_options(np.ones((2, 20)), SMALL, 8)


def message_of(budget, *arguments, whitelist=()):
    heads, channels = small_options(whitelist)
    if budget.units == "channels":
        heads = None
    with pytest.raises(BudgetError) as caught:
        compile_units(heads, channels, SMALL, budget, *arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            Budget(keep=0.1, units="channels"),
            "budget keep 0.1 is below the smallest plan, 0.4000 of the channel parameters "
            "(8 channels per layer). Ask for keep 0.4 or more.",
        ),
        (
            Budget(keep=0.1, units="both"),
            "budget keep 0.1 is below the smallest plan, 0.3158 of the head and channel parameters "
            "(one KV group and 8 channels per layer, and the whitelist). Ask for keep 0.3158 or "
            "more.",
        ),
        (
            Budget(max_params=5, units="both"),
            "budget max_params 5 is below the smallest plan, 704 parameters (one KV group and 8 "
            "channels per layer, and the whitelist). Ask for max_params 704 or more.",
        ),
    ],
)
def test_infeasible_budgets_name_the_smallest_that_can_be_met(budget, message):
    assert message_of(budget) == message


def test_infeasible_uniform_budgets_name_the_nearest():
    assert message_of(Budget(keep=0.3, units="channels"), "uniform") == (
        "budget keep 0.3 is below the smallest uniform plan (8 channels, 0.4000 of the channel "
        "parameters). Ask for keep 0.4 or more."
    )
    whitelist = [(0, 0), (0, 1), (0, 4), (1, 2)]
    text = message_of(
        Budget(keep=0.6, units="both"), "uniform", lambda n: n % 3 == 0, whitelist=whitelist
    )
    assert text == (
        "budget keep 0.6 is below the smallest uniform plan (6 query heads in 3 KV groups and 8 "
        "channels, 0.6843 of the head and channel parameters); the next below (3 query heads in 3 "
        "KV groups and 8 channels, 0.5264 of the head and channel parameters) drops whitelisted "
        "heads. The stock config accepts 3, 6 query heads. Ask for keep 0.6843 or more."
    )


def test_options_must_be_of_the_budget_s_units():
    heads, channels = small_options()
    for budget, given in [
        (Budget(keep=0.9), (heads, channels)),
        (Budget(keep=0.9, units="both"), (heads, None)),
        (Budget(keep=0.9, units="channels"), (heads, channels)),
    ]:
        with pytest.raises(AssertionError, match=r"options of (heads|channels)"):
            compile_units(*given, SMALL, budget)


def test_a_large_model_is_proven_optimal():
    shape = ModelShape("qwen2", 48, 5120, 40, 8, 128, 13824, 1000, False, 2, qkv_bias=True)
    rng = np.random.default_rng(29)
    weights = (shape.query_head_parameters + shape.kv_head_parameters / 5, shape.channel_parameters)
    scores = rng.gamma(2.0, size=(48, 40)), rng.gamma(2.0, size=(48, 13824))
    heads = layer_options(per_parameter(scores[0], weights[0]), shape)
    channels = channel_options(per_parameter(scores[1], weights[1]), shape)
    for keep in (0.9, 0.7, 0.4):
        budget = Budget(keep=keep, units="both")
        _, realised = compile_units(heads, channels, shape, budget)
        assert realised.score_bound == realised.score
        assert 0.999 * realised.limit < realised.cost <= realised.limit
