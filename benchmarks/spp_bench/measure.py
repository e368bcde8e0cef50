"""All candidates in one cell, round by round: whatever the machine does, it does to all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from spp_bench.cases import Cell, Tokens
from spp_bench.clocks import no_collection
from spp_bench.engines.runner import Runner
from spp_export.common.progress import progress

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")

WARM_UP_ROUNDS = 1
# Threads of one library keep spinning for a while after its work, and would slow the next one.
_SETTLE_SECONDS = 0.1
_CONFIDENCE = 0.99
# Rounds of which the smallest is below the true median with that confidence.
FEWEST = 7


@dataclass
class Samples:
    """Seconds of every round of one candidate: a whole prefill, and one decode step on average."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def of(self, phase: Phase) -> list[float]:
        """The seconds of a phase."""
        return self.prefill if phase == "prefill" else self.decode


def in_turn(
    cells: Sequence[Cell], new_tokens: int, rounds: int, runners: int
) -> Iterator[tuple[Cell, Callable[[], None]]]:
    """Cells, each with a function to call after every runner's turn, warm-up included.

    A cell's share of the progress bar is about its share of the time.
    """
    costs = [cell.batch * (cell.context + 4 * new_tokens) for cell in cells]
    turns = (rounds + WARM_UP_ROUNDS) * runners
    with progress("timing", float(sum(costs))) as advance_to:
        for index, cell in enumerate(cells):
            ends = np.linspace(sum(costs[:index]), sum(costs[: index + 1]), turns + 1)
            yield cell, partial(_next_of, ends[1:].tolist()[::-1], advance_to)


def _next_of(marks: list[float], advance_to: Callable[[float], None]) -> None:
    advance_to(marks.pop())


def measure_cell(
    runners: Sequence[Runner],
    tokens: Tokens,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
    settle: float = _SETTLE_SECONDS,
) -> dict[str, Samples]:
    """Samples by the runners' names. Each round begins with another runner.

    `advance` is called after every runner's turn, warm-up included.
    """
    samples = {runner.name: Samples() for runner in runners}
    for runner in runners:
        runner.reserve(tokens.prompt.shape[1] + tokens.continuation.shape[1])
    for turn in range(-WARM_UP_ROUNDS, rounds):
        start = turn % len(runners)
        for runner in [*runners[start:], *runners[:start]]:
            time.sleep(settle)
            with no_collection():
                prefill = runner.clock(partial(runner.prefill, tokens.prompt))
                decode = runner.clock(partial(runner.decode, tokens.continuation))
            runner.forget()
            if turn >= 0:
                samples[runner.name].prefill.append(prefill)
                samples[runner.name].decode.append(decode / tokens.continuation.shape[1])
            advance()
    return samples


@dataclass(frozen=True)
class Speedup:
    """A speed-up from paired rounds: median, 20th and 80th percentile, and a lower limit.

    `low` is below the true median with 99 % confidence, by the order of the rounds alone; of fewer
    than seven rounds nothing is so certain, and it is None.
    """

    median: float
    p20: float
    p80: float
    low: float | None


def speedup(dense: Sequence[float], slim: Sequence[float]) -> Speedup:
    """How much faster the second is, from the ratio of times in each round."""
    ratios = np.sort(np.asarray(dense) / np.asarray(slim))
    p20, median, p80 = (float(value) for value in np.quantile(ratios, [0.2, 0.5, 0.8]))
    rank = _low_rank(len(ratios))
    return Speedup(median, p20, p80, None if rank is None else float(ratios[rank]))


def _low_rank(count: int) -> int | None:
    """The highest rank, from 0, whose value is above the true median with a probability of at most
    1 %; None where there is none."""
    rank, as_few = -1, 0
    while rank < count:
        # The number of samples below the median is distributed like heads of tossed coins.
        as_few += math.comb(count, rank + 1)
        if as_few / 2**count > 1 - _CONFIDENCE:
            break
        rank += 1
    return None if rank < 0 else rank
