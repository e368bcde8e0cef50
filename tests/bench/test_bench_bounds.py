"""Bounds against hand counts of what a model moves and computes."""

from __future__ import annotations

import pytest

from spp_bench.bounds import Bound, Rates, Sizes, Work, bound
from spp_bench.cases import Cell
from spp_export.models.shape import LayerShape, ModelShape

# Two layers, 4 query heads of 2 elements over 2 KV heads, 6 channels, 10 words of width 8.
SHAPE = ModelShape("llama", 2, 8, 4, 2, 2, 6, 10, False, 4)
# q and o 8x8, k and v 8x4, gate, up and down 8x6; a word's vector in the head.
LAYER, HEAD = 2 * 64 + 2 * 32 + 3 * 48, 80


def sizes(layers=SHAPE.layers, windows=(None, None), every_logit=False) -> Sizes:
    return Sizes(SHAPE, layers, windows, 4 * SHAPE.decode_parameters(layers), 4, every_logit)


def test_a_decode_step_reads_weights_once_and_the_cache_of_every_sequence():
    work = sizes().decode(Cell(3, 10), new_tokens=1)
    # 11 tokens with the new one; per token two layers of 2 heads x 2 elements, K and V, 4 bytes.
    assert work.bytes == 4 * SHAPE.decode_parameters(SHAPE.layers) + 3 * 11 * (2 * 2 * 2 * 2 * 4)
    attention = 2 * 4 * 11 * 2 * 2 * 2  # layers, heads, tokens, elements, QK and PV, mul and add
    assert work.operations == 3 * (2 * (2 * LAYER + HEAD) + attention)


def test_decoding_counts_the_average_context_of_its_steps():
    steps = [sizes().decode(Cell(1, 10 + i), 1) for i in range(5)]
    work = sizes().decode(Cell(1, 10), 5)
    assert work.bytes == pytest.approx(sum(step.bytes for step in steps) / 5)
    assert work.operations == pytest.approx(sum(step.operations for step in steps) / 5)


@pytest.mark.parametrize("every_logit", [False, True])
def test_prefill_attends_causally(every_logit):
    work = sizes(every_logit=every_logit).prefill(Cell(2, 3))
    pairs = 1 + 2 + 3
    attention = 2 * 4 * pairs * 2 * 2 * 2
    logits = 3 if every_logit else 1
    assert work.operations == 2 * (3 * 2 * 2 * LAYER + attention + logits * 2 * HEAD)


def test_a_window_limits_what_is_read():
    whole, windowed = (sizes(windows=w).decode(Cell(1, 100), 1) for w in [(None, None), (8, None)])
    assert whole.bytes - windowed.bytes == (101 - 8) * 2 * 2 * 2 * 4
    assert sizes(windows=(200, 200)).decode(Cell(1, 100), 1) == whole


def test_a_prompt_longer_than_a_window_sees_it_fill_and_then_as_much():
    whole, windowed = (sizes(windows=w).prefill(Cell(1, 10)) for w in [(None, None), (4, None)])
    unseen = sum(max(0, position - 4) for position in range(1, 11))
    assert whole.operations - windowed.operations == pytest.approx(4 * unseen * 2 * 2 * 2)
    assert sizes(windows=(10, 99)).prefill(Cell(1, 10)) == whole


def test_the_larger_term_sets_the_bound():
    dense, slim = Work(100.0, 100.0), Work(80.0, 50.0)
    slow_memory = bound(dense, slim, Rates(1.0, 100.0))
    assert (slow_memory.value, slow_memory.term) == (100 / 80, "bytes")
    slow_compute = bound(dense, slim, Rates(100.0, 1.0))
    assert (slow_compute.value, slow_compute.term) == (2.0, "operations")
    assert slow_memory.ceiling == slow_compute.ceiling == 2.0
    # The slim model may be held up by the other term.
    assert bound(dense, Work(80.0, 10.0), Rates(1.0, 1.0)).value == 100 / 80


def test_efficiency_is_the_share_of_the_gain_that_is_possible():
    assert Bound(1.5, 1.5, "bytes").efficiency(1.25) == 0.5
    assert Bound(1.5, 1.5, "bytes").efficiency(0.9) == pytest.approx(-0.2)
    assert Bound(1.02, 1.02, "bytes").efficiency(1.01) is None


def test_a_speedup_beyond_the_ceiling_and_three_percent_is_an_error():
    limit = Bound(1.1, 1.2, "bytes")
    assert not limit.exceeded(1.2 * 1.029)
    assert limit.exceeded(1.2 * 1.031)


def test_kv_heads_and_query_heads_count_where_they_matter():
    fewer_kv = sizes(layers=(LayerShape(4, 1, 6), LayerShape(4, 2, 6)))
    cell = Cell(4, 1000)
    assert sizes().kv_bytes(cell, 1000) / fewer_kv.kv_bytes(cell, 1000) == pytest.approx(4 / 3)
