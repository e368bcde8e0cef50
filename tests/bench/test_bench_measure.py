"""How candidates take turns, and what paired rounds say."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from benching import FakeRunner

from spp_bench.cases import Cell, grid, tokens
from spp_bench.clocks import no_collection
from spp_bench.measure import WARM_UP_ROUNDS, in_turn, measure_cell, speedup
from spp_export.common.errors import UsageError
from spp_export.common.progress import show_progress

FED = tokens(Cell(2, 5), 3, 100)


def test_all_run_in_every_round_and_each_is_first_in_turn():
    log: list = []
    runners = [FakeRunner(name, log, seconds) for name, seconds in (("a", 1.0), ("b", 2.0))]
    turns = []
    found = measure_cell(runners, FED, 3, lambda: turns.append(1), settle=0)
    rounds = 3 + WARM_UP_ROUNDS
    assert len(log) == 2 * 2 * rounds
    assert len(turns) == 2 * rounds
    firsts = [log[4 * i][0] for i in range(rounds)]
    assert all(one != other for one, other in pairwise(firsts))
    assert found["a"].prefill == [1.0] * 3
    assert found["b"].decode == [2.0 / 3] * 3  # per step


def test_progress_ends_where_the_costs_of_all_cells_are_done():
    seen, totals = [], []

    @contextmanager
    def progress(_, total):
        totals.append(total)
        yield seen.append

    runners = [FakeRunner(name, []) for name in "ab"]
    with show_progress(progress):
        for cell, advance in in_turn([Cell(1, 8), Cell(2, 8)], 3, 2, len(runners)):
            measure_cell(runners, tokens(cell, 3, 100), 2, advance, settle=0)
    assert totals == [20 + 40]
    assert len(seen) == 2 * 2 * (2 + WARM_UP_ROUNDS)
    assert seen == sorted(seen)
    assert (seen[5], seen[-1]) == (20, 60)


def test_all_are_fed_the_same_and_room_is_made_for_it():
    log: list = []
    runners = [FakeRunner(name, log) for name in "ab"]
    measure_cell(runners, FED, 1, settle=0)
    assert {entry[2] for entry in log} == {FED.prompt.tobytes(), FED.continuation.tobytes()}
    assert [runner.length for runner in runners] == [8, 8]


def test_the_collector_is_off_while_timing_and_on_again_after_an_error():
    def fail() -> None:
        with no_collection():
            assert not gc.isenabled()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert gc.isenabled()


def test_tokens_fill_the_context_and_depend_on_cell_and_seed_alone():
    cell = Cell(3, 50)
    one, same, other = tokens(cell, 4, 90), tokens(cell, 4, 90), tokens(cell, 4, 90, seed=1)
    assert one.prompt.shape == (3, 50)
    assert one.continuation.shape == (3, 4)
    assert one.prompt.min() >= 0
    assert one.prompt.max() < 90
    assert (one.prompt == same.prompt).all()
    assert (one.prompt != other.prompt).any()


def test_speedup_pairs_rounds():
    # The machine was twice as slow in the second round, for both.
    found = speedup([1.5, 3.0, 1.5], [1.0, 2.0, 1.0])
    assert found.median == found.p20 == found.p80 == pytest.approx(1.5)


@pytest.mark.parametrize("rounds", [7, 11, 15])
def test_what_a_speedup_is_at_least_rarely_lies(rounds):
    """Below the true median with 99 %."""
    random = np.random.default_rng(rounds)
    draws = np.exp(random.normal(0, 0.1, (4000, rounds)))  # of median 1
    lows = np.array([speedup(draw, np.ones(rounds)).low for draw in draws])
    assert (lows > 1).mean() <= 0.01 + 3 * np.sqrt(0.01 / 4000)


def test_of_few_rounds_a_speedup_has_no_limit():
    assert speedup([9.0] * 6, [1.0] * 6).low is None
    assert speedup([9.0] * 7, [1.0] * 7).low == 9.0


def test_the_grid_goes_from_small_to_large_without_repeats():
    assert grid([4, 1], [64, 64, 8]) == (Cell(1, 8), Cell(1, 64), Cell(4, 8), Cell(4, 64))
    with pytest.raises(UsageError, match="--context"):
        grid([1], [0])
