"""compile_units where whole experts go, their channels, those of MLPs in layers without experts, or
all of these, against every combination of numbers and widths."""

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
    channel_options,
    expert_channel_options,
    expert_options,
    layer_options,
)
from spp_export.planning.plan import layer_shapes

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
# Of the same two, four experts of six channels each; of the layer between them, an MLP of ten.
CHANNELS = np.random.default_rng(5).random((2, 24))
MLP = np.random.default_rng(6).random((3, 10))
WIDTHS, MLP_WIDTHS = (2, 4, 6), (2, 4, 6, 8, 10)
# Parameters of a channel of one expert, and of the rest of an expert.
CHANNEL, REST = 24, 8


def options(scores: np.ndarray = SCORES, inside: np.ndarray | None = None) -> ExpertOptions:
    return expert_options(scores, SHAPE, inside, multiple=2)


def compiled(keep: float, units: Units = "experts", layout: Layout = "per-layer"):
    heads = layer_options(HEADS, SHAPE) if units in ("all", "both") else None
    experts = options(inside=CHANNELS if units == "all" else None)
    if units in ("channels", "both"):
        experts = expert_channel_options(CHANNELS, SHAPE, multiple=2)
    channels = None if units == "experts" else channel_options(MLP, SHAPE, 2)
    budget = Budget(keep=keep, units=units)
    return compile_units(heads, channels, SHAPE, budget, layout, experts=experts)


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
    assert realised.channel_keep is realised.mlp_keep is None
    assert realised.parameters == SHAPE.parameters(layer_shapes(layers, SHAPE))


def worth_of_width(row: int, width: int) -> np.ndarray:
    """What the channels of each expert of a layer are worth, the best `width` of them."""
    ordered = -np.sort(-CHANNELS[row].reshape(4, 6), axis=1)
    worth: np.ndarray = ordered[:, :width].sum(axis=1)
    return worth


def worth_of_mlp(width: int) -> float:
    return float(-np.sort(-MLP[1])[:width].sum())


def mlp_of(layer: LayerPlan) -> list[int]:
    return list(range(10)) if layer.channels is None else list(layer.channels)


def rows_of(layer: LayerPlan) -> list[range] | list[tuple[int, ...]]:
    stay = len(kept(layer))
    return [range(6)] * stay if layer.expert_channels is None else list(layer.expert_channels)


@pytest.mark.parametrize("keep", [0.32, 0.35, 0.5, 0.7, 0.84, 0.95, 1.0])
def test_every_expert_and_mlp_keeps_its_best_channels(keep: float) -> None:
    """As many as the others of its layer an expert, and any number an MLP."""
    layers, realised = compiled(keep, "channels")
    assert layers[1].expert_channels is None
    assert all(layer.experts is None for layer in layers)
    assert layers[0].channels is layers[2].channels is None
    best = max(
        worth_of_width(0, a).sum() + worth_of_width(1, b).sum() + worth_of_mlp(c)
        for a, b, c in product(WIDTHS, WIDTHS, MLP_WIDTHS)
        if 4 * (a + b) + c <= keep * 58 + 1e-9
    )
    value = MLP[1, mlp_of(layers[1])].sum()
    for row, index in ((0, 0), (1, 2)):
        rows = rows_of(layers[index])
        assert len({len(row) for row in rows}) == 1
        scores = CHANNELS[row].reshape(4, 6)
        value += sum(scores[expert, list(kept)].sum() for expert, kept in enumerate(rows))
    assert value == pytest.approx(best)
    assert realised.score == pytest.approx(best)
    assert realised.dense_score == pytest.approx(CHANNELS.sum() + MLP[1].sum())
    assert realised.channel_keep == realised.keep <= keep
    assert realised.mlp_keep == len(mlp_of(layers[1])) / 10
    assert realised.expert_keep is None
    assert realised.parameters == SHAPE.parameters(layer_shapes(layers, SHAPE))


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
def test_heads_and_channels_of_experts_compete_for_one_budget(keep: float) -> None:
    _, realised = compiled(keep, "both")
    heads, sizes = layer_options(HEADS, SHAPE).value, list(product((1, 2), repeat=2))
    best = max(
        sum(heads[index, a - 1, b - 1] for index, (a, b) in enumerate(chosen))
        + sum(worth_of_width(row, n).sum() for row, n in enumerate(widths))
        + worth_of_mlp(mlp)
        for chosen in product(sizes, repeat=3)
        for *widths, mlp in product(WIDTHS, WIDTHS, MLP_WIDTHS)
        if sum(a * b * 64 + a * 64 for a, b in chosen) + (sum(widths) * 4 + mlp) * CHANNEL
        <= realised.limit
    )
    assert realised.score == pytest.approx(best)


@pytest.mark.parametrize("keep", [0.3, 0.45, 0.6, 0.8])
def test_heads_experts_and_their_channels_compete_for_one_budget(keep: float) -> None:
    """Every number of experts with every width: the best experts at that width, each worth the
    share of its score that its channels keep of theirs; and of the MLP every width."""
    layers, realised = compiled(keep, "all")
    heads, sizes = layer_options(HEADS, SHAPE).value, list(product((1, 2), repeat=2))
    every = list(product((2, 3, 4), WIDTHS))

    def worth(row: int, count: int, width: int) -> float:
        share = worth_of_width(row, width) / worth_of_width(row, 6)
        return float(-np.sort(-SCORES[row] * share)[:count].sum())

    best = max(
        sum(heads[index, a - 1, b - 1] for index, (a, b) in enumerate(chosen))
        + sum(worth(row, *size) for row, size in enumerate(experts))
        + worth_of_mlp(mlp)
        for chosen in product(sizes, repeat=3)
        for experts in product(every, repeat=2)
        for mlp in MLP_WIDTHS
        if sum(a * b * 64 + a * 64 for a, b in chosen)
        + sum(count * (REST + width * CHANNEL) for count, width in experts)
        + mlp * CHANNEL
        <= realised.limit
    )
    assert realised.score == pytest.approx(best)
    of_plan = MLP[1, mlp_of(layers[1])].sum()
    for row, index in ((0, 0), (1, 2)):
        scores = CHANNELS[row].reshape(4, 6)
        for expert, channels in zip(kept(layers[index]), rows_of(layers[index]), strict=True):
            share = scores[expert, list(channels)].sum() / scores[expert].sum()
            of_plan += SCORES[row, expert] * share
    for index, layer in enumerate(layers):
        of_plan += HEADS[index, list(layer.query_heads)].sum()
    assert of_plan == pytest.approx(best)
    shapes = layer_shapes(layers, SHAPE)
    assert realised.keep == kept_share(SHAPE, shapes, "all") <= keep
    assert realised.mlp_keep == len(mlp_of(layers[1])) / 10
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
    spent += len(mlp_of(layers[1])) * CHANNEL
    assert realised.cost == spent + 2 * count * (REST + width * CHANNEL) <= realised.limit
    layers, realised = compiled(0.7, "channels", "uniform")
    assert [len(rows_of(layers[index])[0]) for index in (0, 2)] == [4, 4]
    # 40 of 58 channels: the MLP keeps 8 of its ten, for two more would be too many.
    assert len(mlp_of(layers[1])) == 8
    assert (realised.next_larger_channels, realised.next_larger_mlp_channels) == (4, 10)


def test_a_token_finds_as_many_experts_as_it_is_routed_to() -> None:
    message = r"0\.5000 of the expert parameters .2 experts in every layer that has any"
    with pytest.raises(BudgetError, match=message):
        compiled(0.4)
    with pytest.raises(BudgetError, match=r"below the smallest uniform plan .2 experts, 0\.5000"):
        compiled(0.4, layout="uniform")
    each = r"2 channels per MLP and 2 channels per expert"
    with pytest.raises(BudgetError, match=rf"0\.3104 of the channel parameters .{each}"):
        compiled(0.2, "channels")
    each = r"2 channels of every MLP and 2 channels of every expert"
    with pytest.raises(BudgetError, match=rf"uniform plan .{each}, 0\.3104"):
        compiled(0.2, "channels", "uniform")
    with pytest.raises(BudgetError, match=r"2 experts in every .* with 2 channels per MLP and 2 c"):
        compiled(0.1, "all")
    each = "2 channels of every MLP and 2 experts of 2 channels"
    with pytest.raises(BudgetError, match=rf"query heads in 1 KV groups and {each}"):
        compiled(0.1, "all", "uniform")


def test_what_has_no_experts_is_refused() -> None:
    with pytest.raises(PlanError, match=r"scores have shape \[3, 4\] .* needs \[2, 4\]"):
        options(np.ones((3, 4)))
    for limit in ({"max_kv_bytes": 10}, {"keep": 0.5, "cost": "kv-bytes"}):
        with pytest.raises(UsageError, match="units are experts; use units heads"):
            Budget(units="experts", **limit)
    with pytest.raises(UsageError, match="tables of latency know no experts"):
        Budget(units="all", keep=0.5, cost="latency")
