"""compile_units where whole experts go, against every combination of their numbers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from spp_export.common.errors import BudgetError, PlanError, UsageError
from spp_export.models.families import FAMILIES
from spp_export.models.shape import Layout, ModelShape, Units, kept_share
from spp_export.planning import Budget, LayerPlan, compile_units
from spp_export.planning.allocate.options import NestedOptions, expert_options, layer_options

CONFIG = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_hidden_layers": 3,
    "vocab_size": 30,
    "intermediate_size": 10,
    "moe_intermediate_size": 6,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
}
SHAPE = FAMILIES["qwen3_moe"].read_shape(CONFIG, 2)
# Of the two layers that have experts.
SCORES = np.random.default_rng(3).random((2, 4))
HEADS = np.random.default_rng(4).random((3, 4))


def options(scores: np.ndarray = SCORES) -> NestedOptions:
    return expert_options(scores, SHAPE)


def compiled(keep: float, units: Units = "experts", layout: Layout = "per-layer"):
    heads = layer_options(HEADS, SHAPE) if units == "all" else None
    budget = Budget(keep=keep, units=units)
    return compile_units(heads, None, SHAPE, budget, layout, experts=options())


def kept(layer: LayerPlan, shape: ModelShape = SHAPE) -> list[int]:
    return list(range(shape.experts)) if layer.experts is None else list(layer.experts)


@pytest.mark.parametrize("keep", [0.5, 0.62, 0.75, 0.9, 1.0])
def test_experts_are_the_best_of_all_that_fit(keep: float) -> None:
    layers, realised = compiled(keep)
    assert layers[1].experts is None
    value = sum(SCORES[row, kept(layers[index])].sum() for row, index in ((0, 0), (1, 2)))
    ordered = -np.sort(-SCORES, axis=1)
    best = max(
        ordered[0, :a].sum() + ordered[1, :b].sum()
        for a, b in product((2, 3, 4), repeat=2)
        if a + b <= keep * 8 + 1e-9
    )
    assert value == pytest.approx(best)
    assert realised.score == pytest.approx(best)
    assert realised.dense_score == pytest.approx(SCORES.sum())
    assert realised.expert_keep == realised.keep <= keep
    assert realised.channel_keep is None
    shapes = [layer.shape(SHAPE) for layer in layers]
    assert realised.parameters == SHAPE.parameters(shapes)


@pytest.mark.parametrize("keep", [0.45, 0.6, 0.8])
def test_heads_and_experts_compete_for_one_budget(keep: float) -> None:
    layers, realised = compiled(keep, "all")
    heads, experts = layer_options(HEADS, SHAPE).value, options().value
    sizes = list(product((1, 2), repeat=2))
    best = max(
        sum(heads[index, a - 1, b - 1] for index, (a, b) in enumerate(chosen))
        + sum(experts[row, count - 2] for row, count in enumerate(counts))
        for chosen in product(sizes, repeat=3)
        for counts in product((2, 3, 4), repeat=2)
        if sum(a * b * 64 + a * 64 for a, b in chosen) + sum(counts) * 152 <= realised.limit
    )
    assert realised.score == pytest.approx(best)
    shapes = [layer.shape(SHAPE) for layer in layers]
    assert realised.keep == kept_share(SHAPE, shapes, "all") <= keep
    assert realised.expert_keep == kept_share(SHAPE, shapes, "experts")
    assert realised.head_keep == kept_share(SHAPE, shapes, "heads")


def test_a_uniform_layout_has_as_many_in_every_layer_that_has_any() -> None:
    layers, realised = compiled(0.8, layout="uniform")
    assert [len(kept(layer)) for layer in layers] == [3, 4, 3]
    assert layers[1].experts is None
    assert realised.next_larger_experts == 4
    assert realised.next_larger_channels is None


def test_a_token_finds_as_many_experts_as_it_is_routed_to() -> None:
    message = r"0\.5000 of the expert parameters .2 experts in every layer that has any"
    with pytest.raises(BudgetError, match=message):
        compiled(0.4)
    with pytest.raises(BudgetError, match=r"below the smallest uniform plan .2 experts, 0\.5000"):
        compiled(0.4, layout="uniform")


def test_what_has_no_experts_is_refused() -> None:
    with pytest.raises(PlanError, match=r"scores have shape \[3, 4\] .* needs \[2, 4\]"):
        options(np.ones((3, 4)))
    for limit in ({"max_kv_bytes": 10}, {"keep": 0.5, "cost": "kv-bytes"}):
        with pytest.raises(UsageError, match="units are experts; use units heads"):
            Budget(units="experts", **limit)
    with pytest.raises(UsageError, match="tables of latency know no experts"):
        Budget(units="all", keep=0.5, cost="latency")
