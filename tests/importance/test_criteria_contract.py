"""What holds for every criterion, whatever it computes."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from spp_export.calibration.statistics import (
    AttentionInputs,
    Axis,
    ExpertColumns,
    ExpertInputs,
    ExpertOutputs,
    Gradients,
    LayerStatistics,
    LayerWeights,
    MlpInputs,
)
from spp_export.importance import CRITERIA, SCORING
from spp_export.importance.base import Need, SetCriterion
from spp_export.importance.comparable import COMPARABLE

GROUPS, SIZE, DIM, HIDDEN, CHANNELS, EXPERTS = 2, 3, 4, 10, 14, 5
HEADS = GROUPS * SIZE
# Experts, and the channels of each.
INSIDE = EXPERTS, 6
PARTS = {
    Need.ACTIVATIONS: ("attention", "mlp", "experts", "expert_inputs"),
    Need.GRADIENTS: ("gradients",),
    Need.AXIS: ("axis",),
}
everything = pytest.mark.parametrize("criterion", SCORING.values(), ids=SCORING)


def make(seed=0, dtype=np.float32, scale=1.0):
    """A layer of random numbers; read-only, as statistics are shared."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        array = (scale * random.standard_normal(shape)).astype(dtype)
        array.setflags(write=False)
        return array

    def positive(*shape):
        return np.abs(normal(*shape))

    query, shared = HEADS * DIM, GROUPS * DIM
    tokens, hidden = normal(30, HEADS, DIM), normal(30, CHANNELS)
    weights = LayerWeights(
        query=normal(query, HIDDEN),
        key=normal(shared, HIDDEN),
        value=normal(shared, HIDDEN),
        output=normal(HIDDEN, query),
        gate=normal(CHANNELS, HIDDEN),
        up=normal(CHANNELS, HIDDEN),
        down=normal(HIDDEN, CHANNELS),
    )
    attention = AttentionInputs(
        input_square=positive(HIDDEN),
        mean=tokens.reshape(30, -1).mean(axis=0),
        square=(tokens.reshape(30, -1) ** 2).mean(axis=0),
        second=np.einsum("tha,thb->hab", tokens, tokens) / 30,
    )
    mlp = MlpInputs(positive(HIDDEN), hidden.mean(axis=0), (hidden**2).mean(axis=0))
    sizes = (query, shared, shared, query, CHANNELS, CHANNELS, CHANNELS, HEADS, CHANNELS)
    gradients = Gradients(
        **{
            name: positive(size)
            for name, size in zip(
                (
                    "query_rows",
                    "key_rows",
                    "value_rows",
                    "output_columns",
                    "gate_rows",
                    "up_rows",
                    "down_columns",
                    "head_gates",
                    "channel_gates",
                ),
                sizes,
                strict=True,
            )
        }
    )
    direction = normal(HIDDEN)
    axis = Axis(direction / max(np.linalg.norm(direction), 1e-9), positive(HEADS) % 1)
    known = (weights, attention, mlp, gradients, axis)
    experts = ExpertOutputs(positive(EXPERTS), positive(EXPERTS), positive(EXPERTS))
    more = {"experts": experts, "expert_count": EXPERTS}
    more |= {"expert_inputs": ExpertInputs(positive(*INSIDE))}
    more |= {"expert_columns": ExpertColumns(positive(*INSIDE), positive(*INSIDE))}
    return LayerStatistics(5, HEADS, GROUPS, *known, seed=3, **more)


def units_of(criterion):
    """The scores that it gives, and of how many units."""
    counted = [(criterion.heads, HEADS), (criterion.channels, CHANNELS)]
    counted += [(criterion.experts, EXPERTS)] if criterion.experts else []
    inside = criterion.expert_channels
    size = INSIDE[0] * INSIDE[1]
    return counted + ([(lambda layer: inside(layer).ravel(), size)] if inside else [])


def pick(record, axes):
    """The record with some of its arrays re-ordered: name to (axis, order)."""
    return replace(
        record,
        **{name: np.take(getattr(record, name), order, axis) for name, (axis, order) in axes},
    )


def reorder_heads(layer, heads, groups):
    """The same layer with query heads and KV heads in another order."""
    rows = (np.asarray(heads)[:, None] * DIM + np.arange(DIM)).reshape(-1)
    shared = (np.asarray(groups)[:, None] * DIM + np.arange(DIM)).reshape(-1)
    q, o, kv, h = (0, rows), (1, rows), (0, shared), (0, heads)
    return replace(
        layer,
        weights=pick(layer.weights, {"query": q, "output": o, "key": kv, "value": kv}.items()),
        attention=pick(layer.attention, {"mean": q, "square": q, "second": h}.items()),
        gradients=pick(
            layer.gradients,
            {
                "query_rows": q,
                "output_columns": q,
                "key_rows": kv,
                "value_rows": kv,
                "head_gates": h,
            }.items(),
        ),
        axis=pick(layer.axis, {"share": h}.items()),
    )


def reorder_channels(layer, order):
    """The same layer with channels in another order."""
    c = (0, order)
    names = ("gate_rows", "up_rows", "down_columns", "channel_gates")
    return replace(
        layer,
        weights=pick(layer.weights, {"gate": c, "up": c, "down": (1, order)}.items()),
        mlp=pick(layer.mlp, {"mean": c, "square": c}.items()),
        gradients=pick(layer.gradients, dict.fromkeys(names, c).items()),
    )


def only(layer, needs):
    """The layer as it comes when no more than `needs` was gathered."""
    given = {part for need in needs for part in PARTS[need]}
    absent = {part for parts in PARTS.values() for part in parts} - given
    return replace(layer, **dict.fromkeys(absent))


@everything
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_are_finite_doubles_of_the_right_shape(criterion, dtype):
    layer = make(dtype=dtype)
    for units, count in units_of(criterion):
        scores = units(layer)
        assert scores.shape == (count,)
        assert scores.dtype == np.float64
        assert np.isfinite(scores).all()
        assert len(set(scores.tolist())) == count


@everything
def test_a_layer_of_zeros_has_finite_scores(criterion):
    layer = make(scale=0.0)
    for units, _ in units_of(criterion):
        assert np.isfinite(units(layer)).all()


@everything
def test_single_precision_costs_little(criterion):
    wide, narrow = make(dtype=np.float64), make(dtype=np.float32)
    for units, _ in units_of(criterion):
        np.testing.assert_allclose(units(narrow), units(wide), rtol=2e-4, atol=2e-5)


@everything
def test_needs_are_what_is_read(criterion):
    layer = make()
    enough = only(layer, criterion.needs)
    for units, _ in units_of(criterion):
        np.testing.assert_array_equal(units(enough), units(layer))
    for need in criterion.needs:
        short = only(layer, criterion.needs - {need})
        for units, _ in units_of(criterion):
            with pytest.raises(AssertionError):
                units(short)


# Random draws belong to places, not to units.
@pytest.mark.parametrize("name", [name for name in SCORING if name != "random"])
def test_scores_follow_their_units(name):
    criterion = SCORING[name]
    layer, random = make(), np.random.default_rng(1)
    for _ in range(3):
        groups = random.permutation(GROUPS)
        heads = np.concatenate([k * SIZE + random.permutation(SIZE) for k in groups])
        found = criterion.heads(reorder_heads(layer, heads, groups))
        np.testing.assert_allclose(found, criterion.heads(layer)[heads], rtol=1e-5)
        order = random.permutation(CHANNELS)
        found = criterion.channels(reorder_channels(layer, order))
        np.testing.assert_allclose(found, criterion.channels(layer)[order], rtol=1e-5)
        if criterion.experts:
            order = random.permutation(EXPERTS)
            axes = dict.fromkeys(("square", "length", "routed"), (0, order))
            found = criterion.experts(replace(layer, experts=pick(layer.experts, axes.items())))
            np.testing.assert_allclose(found, criterion.experts(layer)[order], rtol=1e-5)
        if criterion.expert_channels:
            order = random.permutation(INSIDE[1])
            inputs = pick(layer.expert_inputs, {"square": (1, order)}.items())
            axes = dict.fromkeys(("squares", "sums"), (1, order))
            columns = pick(layer.expert_columns, axes.items())
            moved = replace(layer, expert_inputs=inputs, expert_columns=columns)
            found, expected = map(criterion.expert_channels, (moved, layer))
            np.testing.assert_allclose(found, expected[:, order], rtol=1e-5)


@everything
def test_records_name_what_exists(criterion):
    assert criterion.comparable in COMPARABLE
    assert criterion.companion is None or criterion.companion in SCORING
    assert criterion.source


def test_criteria_that_say_something_of_experts():
    known = {name for name, criterion in CRITERIA.items() if criterion.experts}
    assert known == {"energy", "reap", "random", "obs"}
    assert SCORING[CRITERIA["obs"].experts].comparable == CRITERIA["obs"].comparable
    layer = make()
    square, length, routed = layer.experts.square, layer.experts.length, layer.experts.routed
    np.testing.assert_allclose(SCORING["energy"].experts(layer), np.sqrt(square), rtol=1e-6)
    np.testing.assert_allclose(SCORING["reap"].experts(layer), length / routed, rtol=1e-6)


def test_criteria_that_say_something_of_channels_of_experts():
    known = {name for name, criterion in SCORING.items() if criterion.expert_channels}
    assert known == {"energy", "reap", "random", "magnitude", "wanda-sp"}
    layer = make()
    square, columns = layer.expert_inputs.square, layer.expert_columns
    for name, expected in (
        ("energy", np.sqrt(square * columns.squares)),
        ("reap", np.sqrt(square * columns.squares)),
        ("magnitude", np.sqrt(columns.squares)),
        ("wanda-sp", columns.sums * np.sqrt(square)),
    ):
        found = SCORING[name].expert_channels(layer)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", [n for n, c in CRITERIA.items() if isinstance(c, SetCriterion)])
def test_a_criterion_over_sets_gives_the_loss_of_every_size(name):
    """Dense layers lose nothing, smaller ones never less; sets are of the sizes they say."""
    criterion, layer, random = CRITERIA[name], make(), np.random.default_rng(2)
    assert criterion.source
    assert criterion.needs in ({Need.MOMENTS}, {Need.LOSS})
    assert criterion.comparable == ("raw" if Need.LOSS in criterion.needs else "stream")
    tokens = random.standard_normal((60, HEADS * DIM))
    second = tokens.T @ tokens / 60
    forced = np.zeros((GROUPS, SIZE), dtype=bool)
    forced[1, 2] = True
    for ragged, heads in ((False, SIZE), (True, HEADS)):
        losses, kept = criterion.heads(layer.weights.output, second, forced, ragged=ragged)
        assert losses.shape == (GROUPS, heads)
        assert kept.shape == (GROUPS, heads, GROUPS, SIZE)
        assert losses[-1, -1] == 0
        assert (losses >= 0).all()
        for a, n in np.argwhere(np.isfinite(losses)):
            chosen = kept[a, n]
            assert chosen[1, 2]
            assert chosen.any(axis=1).sum() == a + 1
            counts = chosen.sum(axis=1)[chosen.any(axis=1)]
            assert (counts.sum() if ragged else counts.max()) == n + 1
    values = random.standard_normal((60, CHANNELS))
    losses, places = criterion.channels(layer.weights.down, (values.T @ values / 60)[None], 4)
    assert losses.shape == (4,)  # 4, 8, 12 and all 14 channels
    assert losses[-1] == 0
    assert (np.diff(losses) <= 0).all()
    assert sorted(places) == list(range(CHANNELS))


def test_the_parts_above_are_all_a_layer_has():
    optional = {field.name for field in fields(LayerStatistics) if field.default is None}
    weights = {"expert_columns"}  # of which nothing is gathered
    assert optional - weights == {part for parts in PARTS.values() for part in parts}


def test_random_knows_seed_layer_and_kind_and_nothing_else():
    heads, channels = SCORING["random"].heads, SCORING["random"].channels
    layer = make(seed=0)
    np.testing.assert_array_equal(heads(layer), heads(make(seed=1)))
    np.testing.assert_array_equal(channels(layer), channels(make(seed=1)))
    draws = [heads(replace(layer, seed=s, layer=n)) for s in range(4) for n in range(4)]
    draws += [channels(layer)[:HEADS]]
    assert len({tuple(draw) for draw in draws}) == len(draws)
    assert 0 <= np.min(draws) <= np.max(draws) < 1
