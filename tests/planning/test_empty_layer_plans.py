"""Layers without attention or MLP among the options, against every plan there is."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
from planning import layer_cost, mask_of, model_shape, ragged_masks, regular_masks

from spp_export.common.errors import BudgetError, PlanError
from spp_export.importance.obs import attention_loss, channel_losses, head_losses
from spp_export.planning import compile_units, dense_plan, forced_heads, validate_plan
from spp_export.planning.allocate.options import (
    SetOptions,
    channel_options,
    layer_options,
    ragged_options,
    with_nothing,
)
from spp_export.planning.budget import Budget

# Layers, query heads, KV heads, channels, multiple of widths.
SIZES = [(2, 4, 2, 6, 2), (3, 2, 2, 4, 3), (3, 2, 1, 5, 8), (1, 4, 2, 4, 2)]


class Case:
    """Random scores of a tiny model and, of every layer, (mask, width, score, cost) of all that it
    may keep."""

    def __init__(self, rng, units, *, ragged=False):
        layers, query, kv, channels, self.multiple = SIZES[rng.integers(len(SIZES))]
        self.units, self.ragged = units, ragged
        self.shape = model_shape(layers, query, kv, bias=bool(rng.integers(2)), channels=channels)
        whole = rng.random() < 0.5
        self.head_scores, self.channel_scores = (
            rng.integers(-2, 4, size).astype(float) if whole else rng.normal(0.3, 1, size)
            for size in ((layers, query), (layers, channels))
        )
        some = np.argwhere(rng.random((layers, query)) < rng.choice([0.0, 0.15]))
        self.whitelist = [(int(layer), int(head)) for layer, head in some]

    def heads(self, layer):
        forced = [head for at, head in self.whitelist if at == layer]
        masks = (ragged_masks if self.ragged else regular_masks)(self.shape, forced)
        masks += [] if forced else [np.zeros(self.shape.query_heads, dtype=bool)]
        scores = self.head_scores[layer]
        costs = [layer_cost(self.shape, mask, "parameters") for mask in masks]
        return [
            (bool(mask.any()), scores[mask].sum(), cost)
            for mask, cost in zip(masks, costs, strict=True)
        ]

    def widths(self, layer):
        ordered = np.sort(self.channel_scores[layer])[::-1]
        widths = [w for w in range(len(ordered)) if w % self.multiple == 0] + [len(ordered)]
        each = 3 * self.shape.hidden_size
        return [(False, ordered[:width].sum(), width * each) for width in widths]

    def totals(self):
        """Score and cost of every plan that keeps attention somewhere."""
        layers = range(self.shape.num_layers)
        kinds = [self.heads(layer) for layer in layers] if self.units != "channels" else []
        kinds += [self.widths(layer) for layer in layers] if self.units != "heads" else []
        some, score, cost = (
            reduce(how, [np.array([entry[field] for entry in kind]) for kind in kinds]).ravel()
            for field, how in ((0, np.logical_or.outer), (1, np.add.outer), (2, np.add.outer))
        )
        allowed = some if self.units != "channels" else np.ones_like(some)
        return score[allowed], cost[allowed]

    def compile(self, cost):
        forced = forced_heads(self.whitelist, self.shape)
        heads = channels = None
        if self.units != "channels":
            make = ragged_options if self.ragged else layer_options
            heads = with_nothing(make(self.head_scores, self.shape, forced), 0.0, forced)
        if self.units != "heads":
            channels = channel_options(self.channel_scores, self.shape, self.multiple, none=True)
        of = self.shape
        rest = of.parameters(of.layers)
        rest -= of.head_parameters(of.layers) if self.units != "channels" else 0
        rest -= of.channels * of.num_layers * of.channel_parameters if self.units != "heads" else 0
        budget = Budget(max_params=int(cost) + rest, units=self.units)
        return compile_units(heads, channels, of, budget, "ragged" if self.ragged else "per-layer")

    def check(self, layers, realised):
        """What was compiled scores and costs what it says."""
        score = cost = 0.0
        for index, layer in enumerate(layers):
            if self.units != "channels":
                mask = mask_of(layer, self.shape)
                assert all(mask[head] for at, head in self.whitelist if at == index)
                score += self.head_scores[index][mask].sum()
                cost += layer_cost(self.shape, mask, "parameters")
            if self.units != "heads":
                kept = range(self.shape.channels) if layer.channels is None else layer.channels
                score += self.channel_scores[index][list(kept)].sum()
                cost += 3 * self.shape.hidden_size * len(kept)
        assert realised.cost == cost <= realised.limit
        assert realised.score == pytest.approx(score, abs=1e-12)
        shapes = [layer.shape(self.shape) for layer in layers]
        assert realised.parameters == self.shape.parameters(shapes)
        dense = dense_plan(self.shape, "f", "s")
        layout = "ragged" if self.ragged else "per-layer"
        validate_plan(replace(dense, layout=layout, layers=layers), self.shape, "f")


@pytest.mark.parametrize(
    ("units", "ragged"),
    [("heads", False), ("heads", True), ("channels", False), ("both", False), ("both", True)],
)
def test_plans_with_empty_layers_are_optimal(units, ragged):
    rng = np.random.default_rng(5)
    empty = 0
    for _ in range(40):
        case = Case(rng, units, ragged=ragged)
        scores, costs = case.totals()
        limits = np.unique(costs)
        for limit in {int(limits[0]), *rng.choice(limits, min(6, len(limits)), replace=False)}:
            layers, realised = case.compile(limit)
            case.check(layers, realised)
            assert realised.score == pytest.approx(scores[costs <= limit].max(), abs=1e-12)
            assert realised.score_bound == realised.score
            empty += any(layer.kv_heads == () or layer.channels == () for layer in layers)
        if costs.min() > 0:
            with pytest.raises(BudgetError, match="is below the smallest plan"):
                case.compile(costs.min() - 1)
    assert empty > 20


def test_the_smallest_plan_has_attention_in_one_layer():
    shape = model_shape(3, 4, 2)
    forced = forced_heads([], shape)
    options = with_nothing(layer_options(np.zeros((3, 4)), shape, forced), 0.0, forced)
    with pytest.raises(BudgetError, match="one KV group in one layer, and the whitelist"):
        compile_units(options, None, shape, Budget(keep=0.05))
    layers, _ = compile_units(options, None, shape, Budget(max_kv_bytes=12))
    assert [len(layer.kv_heads) for layer in layers].count(1) == 1


def test_a_set_criterion_gives_up_attention_at_its_whole_energy():
    """Of obs: no size of a layer loses more, and moments of rank one lose exactly it."""
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(6, 8))
    inputs = rng.normal(size=(40, 8))
    second = inputs.T @ inputs / 40
    losses, sets = head_losses(weight, second, np.zeros((2, 2), dtype=bool))
    whole = attention_loss(weight, second)
    energy = np.mean(np.sum((inputs @ weight.T) ** 2, axis=1))
    noise = 0.01 * np.mean(np.diag(second)) * np.sum(weight**2)
    assert whole == pytest.approx(energy + noise)
    assert (losses <= whole).all()
    channels, _ = channel_losses(weight, second[None], 3, none=True)
    assert len(channels) == 4
    assert channels[0] == pytest.approx(whole)
    options = with_nothing(SetOptions(-losses[None], sets[None]), [-whole], np.zeros((1, 4), bool))
    assert not options.kept([0], [1]).any()


def test_a_plan_without_any_attention_is_refused():
    shape = model_shape(2)
    plan = dense_plan(shape, "f", "s")
    empty = replace(plan.layers[0], kv_heads=(), query_heads=())
    one = replace(plan, layout="per-layer", layers=(empty, plan.layers[1]))
    validate_plan(one, shape, "f")
    with pytest.raises(PlanError, match="plan keeps attention in no layer"):
        validate_plan(replace(one, layers=(empty, empty)), shape, "f")
    for layer, what in ((empty, "attention"), (replace(plan.layers[0], channels=()), "MLP")):
        uniform = replace(one, layout="uniform", layers=(layer, plan.layers[1]))
        with pytest.raises(PlanError, match=f"layer 0: plan keeps no {what}, which a stock"):
            validate_plan(uniform, shape, "f")


def test_every_count_of_empty_layers_costs_what_its_tensors_have():
    shape = model_shape(2, output_bias=True, mlp_bias=True, qk_norm=True)
    for heads, channels in itertools.product([0, 4], [0, 10]):
        layer = replace(shape.layer, query_heads=heads, kv_heads=heads // 2, channels=channels)
        assert layer.regular
        found = shape.parameters([layer]) - shape.parameters([])
        norms = 8 * bool(heads) + 8 * bool(channels) + 2 * 3 * bool(heads)
        units = heads * shape.query_head_parameters + heads // 2 * shape.kv_head_parameters
        units += channels * shape.channel_parameters
        assert found == units + norms + 2 * 8  # and the biases of both last projections
