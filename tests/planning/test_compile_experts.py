"""compile_units where whole experts go, their channels, or both, against every combination of
numbers and widths."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from spp_export.common.errors import BudgetError, PlanError, UsageError
from spp_export.models.families import FAMILIES
from spp_export.models.shape import Layout, ModelShape, Units, kept_share
from spp_export.planning import Budget, LayerPlan, compile_units
from spp_export.planning.allocate.options import (
    ExpertOptions,
    expert_channel_options,
    expert_options,
    layer_options,
)

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
# Of every layer, four experts of six channels each.
CHANNELS = np.random.default_rng(5).random((3, 24))
WIDTHS = (2, 4, 6)
# Parameters of a channel of one expert, and of the rest of an expert.
CHANNEL, REST = 24, 8


def options(scores: np.ndarray = SCORES, inside: np.ndarray | None = None) -> ExpertOptions:
    return expert_options(scores, SHAPE, inside, multiple=2)


def compiled(keep: float, units: Units = "experts", layout: Layout = "per-layer"):
    heads = layer_options(HEADS, SHAPE) if units in ("all", "both") else None
    channels = expert_channel_options(CHANNELS, SHAPE, multiple=2)
    experts = options(inside=CHANNELS[[0, 2]] if units == "all" else None)
    budget, inside = Budget(keep=keep, units=units), units in ("channels", "both")
    options_of_mlps = {"channels": channels} if inside else {"experts": experts}
    return compile_units(
        heads,
        options_of_mlps.get("channels"),
        SHAPE,
        budget,
        layout,
        experts=options_of_mlps.get("experts"),
    )


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


def worth_of_width(index: int, width: int) -> np.ndarray:
    """What the channels of each expert of a layer are worth, the best `width` of them."""
    ordered = -np.sort(-CHANNELS[index].reshape(4, 6), axis=1)
    worth: np.ndarray = ordered[:, :width].sum(axis=1)
    return worth


def rows_of(layer: LayerPlan) -> list[range] | list[tuple[int, ...]]:
    stay = len(kept(layer))
    return [range(6)] * stay if layer.expert_channels is None else list(layer.expert_channels)


@pytest.mark.parametrize("keep", [0.35, 0.5, 0.84, 1.0])
def test_every_expert_keeps_its_best_channels_and_as_many(keep: float) -> None:
    layers, realised = compiled(keep, "channels")
    assert layers[1].expert_channels is None
    assert all(layer.channels is None and layer.experts is None for layer in layers)
    best = max(
        worth_of_width(0, a).sum() + worth_of_width(2, b).sum()
        for a, b in product(WIDTHS, repeat=2)
        if a + b <= keep * 12 + 1e-9
    )
    value = 0.0
    for index in (0, 2):
        rows = rows_of(layers[index])
        assert len({len(row) for row in rows}) == 1
        scores = CHANNELS[index].reshape(4, 6)
        value += sum(scores[expert, list(row)].sum() for expert, row in enumerate(rows))
    assert value == pytest.approx(best)
    assert realised.score == pytest.approx(best)
    assert realised.dense_score == pytest.approx(CHANNELS[[0, 2]].sum())
    assert realised.channel_keep == realised.keep <= keep
    assert realised.expert_keep is None
    assert realised.parameters == SHAPE.parameters([layer.shape(SHAPE) for layer in layers])


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
def test_heads_and_channels_of_experts_compete_for_one_budget(keep: float) -> None:
    _, realised = compiled(keep, "both")
    heads, sizes = layer_options(HEADS, SHAPE).value, list(product((1, 2), repeat=2))
    best = max(
        sum(heads[index, a - 1, b - 1] for index, (a, b) in enumerate(chosen))
        + sum(worth_of_width(index, n).sum() for index, n in zip((0, 2), widths, strict=True))
        for chosen in product(sizes, repeat=3)
        for widths in product(WIDTHS, repeat=2)
        if sum(a * b * 64 + a * 64 for a, b in chosen) + sum(widths) * 4 * CHANNEL <= realised.limit
    )
    assert realised.score == pytest.approx(best)


@pytest.mark.parametrize("keep", [0.3, 0.45, 0.6, 0.8])
def test_heads_experts_and_their_channels_compete_for_one_budget(keep: float) -> None:
    """Every number of experts with every width: the best experts at that width, each worth the
    share of its score that its channels keep of theirs."""
    layers, realised = compiled(keep, "all")
    heads, sizes = layer_options(HEADS, SHAPE).value, list(product((1, 2), repeat=2))
    every = list(product((2, 3, 4), WIDTHS))

    def worth(row: int, count: int, width: int) -> float:
        index = (0, 2)[row]
        share = worth_of_width(index, width) / worth_of_width(index, 6)
        return float(-np.sort(-SCORES[row] * share)[:count].sum())

    best = max(
        sum(heads[index, a - 1, b - 1] for index, (a, b) in enumerate(chosen))
        + sum(worth(row, *size) for row, size in enumerate(experts))
        for chosen in product(sizes, repeat=3)
        for experts in product(every, repeat=2)
        if sum(a * b * 64 + a * 64 for a, b in chosen)
        + sum(count * (REST + width * CHANNEL) for count, width in experts)
        <= realised.limit
    )
    assert realised.score == pytest.approx(best)
    of_plan = 0.0
    for row, index in ((0, 0), (1, 2)):
        scores = CHANNELS[index].reshape(4, 6)
        for expert, channels in zip(kept(layers[index]), rows_of(layers[index]), strict=True):
            share = scores[expert, list(channels)].sum() / scores[expert].sum()
            of_plan += SCORES[row, expert] * share
    for index, layer in enumerate(layers):
        of_plan += HEADS[index, list(layer.query_heads)].sum()
    assert of_plan == pytest.approx(best)
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


def test_uniform_layouts_choose_experts_and_their_width_together() -> None:
    layers, realised = compiled(0.5, "all", "uniform")
    sizes = {(len(kept(layers[index])), len(rows_of(layers[index])[0])) for index in (0, 2)}
    ((count, width),) = sizes
    spent = sum(len(layer.query_heads) * 64 + len(layer.kv_heads) * 64 for layer in layers)
    assert realised.cost == spent + 2 * count * (REST + width * CHANNEL) <= realised.limit
    layers, realised = compiled(0.7, "channels", "uniform")
    assert [len(rows_of(layers[index])[0]) for index in (0, 2)] == [4, 4]
    assert realised.next_larger_channels == 6


def test_a_token_finds_as_many_experts_as_it_is_routed_to() -> None:
    message = r"0\.5000 of the expert parameters .2 experts in every layer that has any"
    with pytest.raises(BudgetError, match=message):
        compiled(0.4)
    with pytest.raises(BudgetError, match=r"below the smallest uniform plan .2 experts, 0\.5000"):
        compiled(0.4, layout="uniform")
    with pytest.raises(BudgetError, match=r"0\.3334 of the channel parameters .2 channels per exp"):
        compiled(0.2, "channels")
    with pytest.raises(BudgetError, match=r"uniform plan .2 channels of every expert, 0\.3334"):
        compiled(0.2, "channels", "uniform")
    with pytest.raises(BudgetError, match=r"2 experts in every .* with 2 channels per expert"):
        compiled(0.1, "all")


def test_what_has_no_experts_is_refused() -> None:
    with pytest.raises(PlanError, match=r"scores have shape \[3, 4\] .* needs \[2, 4\]"):
        options(np.ones((3, 4)))
    for limit in ({"max_kv_bytes": 10}, {"keep": 0.5, "cost": "kv-bytes"}):
        with pytest.raises(UsageError, match="units are experts; use units heads"):
            Budget(units="experts", **limit)
    with pytest.raises(UsageError, match="tables of latency know no experts"):
        Budget(units="all", keep=0.5, cost="latency")
