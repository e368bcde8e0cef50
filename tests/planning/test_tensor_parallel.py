"""Plans whose every layer divides among cards, by vLLM's own rule."""

from __future__ import annotations

import numpy as np
import pytest

from spp_export.common.errors import BudgetError, PlanError, UsageError
from spp_export.models.engines import engines_for
from spp_export.models.shape import LayerShape, ModelShape
from spp_export.planning import compile_units
from spp_export.planning.allocate.options import channel_options, dividing_heads, layer_options
from spp_export.planning.budget import Budget
from spp_export.planning.request import PlanRequest

SHAPE = ModelShape("llama", 6, 64, 16, 4, 8, 96, 100, False, 4)
RNG = np.random.default_rng(5)
HEADS = RNG.random((6, 16))
CHANNELS = RNG.random((6, 96))


def vllm_takes(layer: LayerShape, ways: int) -> bool:
    """The divisions of QKVParallelLinear and of the Llama attention around it, in words of ours."""
    if layer.query_heads % ways:
        return False
    if layer.kv_heads >= ways:
        return layer.kv_heads % ways == 0 and layer.channels % ways == 0
    return ways % layer.kv_heads == 0 and layer.channels % ways == 0


def compiled(ways: int, layout: str = "per-layer", keep: float = 0.6, units: str = "both"):
    heads = None if units == "channels" else layer_options(HEADS, SHAPE)
    channels = None if units == "heads" else channel_options(CHANNELS, SHAPE, 4)
    budget = Budget(keep=keep, units=units)
    layers, realised = compile_units(heads, channels, SHAPE, budget, layout, tensor_parallel=ways)
    return [layer.shape(SHAPE) for layer in layers], realised


@pytest.mark.parametrize("ways", [1, 2, 3, 4, 8, 16])
def test_a_shape_splits_as_vllm_divides_it(ways):
    for query in range(1, 17):
        for kv in (n for n in range(1, 9) if query % n == 0):
            for channels in (48, 50):
                layer = LayerShape(query, kv, channels)
                assert layer.splits(ways) == vllm_takes(layer, ways), layer
    assert not LayerShape(4, 2, 48, groups=(3, 1)).splits(1)


@pytest.mark.parametrize("ways", [2, 4, 8])
@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
@pytest.mark.parametrize("units", ["heads", "both"])
def test_every_layer_divides_and_the_budget_holds(ways, layout, units):
    layers, realised = compiled(ways, layout, units=units)
    assert all(vllm_takes(layer, ways) for layer in layers)
    assert realised.cost <= realised.limit
    free, best = compiled(1, layout, units=units)
    assert realised.score <= best.score
    assert realised.dense_score == best.dense_score
    assert not all(vllm_takes(layer, ways) for layer in free) or realised.score == best.score


def worth(options, layer: int, size: LayerShape) -> float:
    return float(options.value[layer, size.kv_heads - 1, size.query_heads // size.kv_heads - 1])


def test_it_is_the_best_of_all_plans_that_divide():
    """Against an exhaustive search over two layers."""
    shape = ModelShape("llama", 2, 64, 8, 4, 8, 96, 100, False, 4)
    options = layer_options(HEADS[:2, :8], shape)
    budget = Budget(keep=0.6)
    layers, realised = compile_units(options, None, shape, budget, tensor_parallel=2)
    sizes = [LayerShape(a * b, a, 96) for a in range(1, 5) for b in range(1, 3)]
    limit = budget.limit(shape, None, None).cost
    allowed = [size for size in sizes if vllm_takes(size, 2)]
    best = max(
        worth(options, 0, one) + worth(options, 1, two)
        for one in allowed
        for two in allowed
        if shape.head_parameters([one, two]) <= limit
    )
    assert realised.score == pytest.approx(best)
    assert len(layers) == 2


def test_numbers_of_kv_heads_divide_those_of_the_dense_model():
    """And they are the best that do, against an exhaustive search over two layers."""
    shape = ModelShape("llama", 2, 64, 12, 6, 8, 96, 100, False, 4)
    free = layer_options(HEADS[:2, :12], shape)
    budget = Budget(keep=0.55)
    layers, realised = compile_units(dividing_heads(free), None, shape, budget)
    assert {len(layer.kv_heads) for layer in layers} <= {1, 2, 3, 6}
    limit = budget.limit(shape, None, None).cost
    sizes = [LayerShape(a * b, a, 96) for a in (1, 2, 3, 6) for b in (1, 2)]
    best = max(
        worth(free, 0, one) + worth(free, 1, two)
        for one in sizes
        for two in sizes
        if shape.head_parameters([one, two]) <= limit
    )
    assert realised.score == pytest.approx(best)


def test_what_cannot_divide_is_refused():
    with pytest.raises(PlanError, match="no number of heads that it may keep divides among 32"):
        compiled(32)
    with pytest.raises(PlanError, match=r"96 channels stay .* do not divide among 5 cards"):
        compiled(5, units="heads")
    with pytest.raises(PlanError, match="16 query heads in 4 KV groups stay"):
        compiled(3, units="channels")
    with pytest.raises(PlanError, match="divide among no cards"):
        compiled(2, "ragged")
    with pytest.raises(BudgetError):
        compiled(8, keep=0.05)
    for wrong in ({"tp": 0}, {"tp": 2, "layout": "ragged"}):
        with pytest.raises(UsageError, match="--tp"):
            PlanRequest(**wrong).check()
    with pytest.raises(UsageError, match="--kv-divisors"):
        PlanRequest(kv_divisors=True, policy="published", strength=0.5).check()


def test_the_list_of_engines_names_the_cards():
    def how(*layers: LayerShape) -> str:
        engines = engines_for("llama", "per-layer", layers)
        return {engine.name: engine.how for engine in engines}["vLLM"]

    assert "1, 2, 4 cards" in how(LayerShape(8, 4, 96), LayerShape(4, 2, 48))
    assert "one card" in how(LayerShape(9, 3, 96))
