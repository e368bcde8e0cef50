"""Models of shapes in one cell, in turns: what is timed for each, and in how many rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from spp_bench.cases import Tokens
from spp_bench.clocks import no_collection
from spp_bench.engines.static import StaticRunner
from spp_bench.measure import WARM_UP_ROUNDS, Phase, Samples


@dataclass(frozen=True)
class Part:
    """One row's part: its phases, in the first `rounds` rounds of a cell.

    Without prefill among them, decoding begins in a cache that no prompt was read into.
    """

    runner: StaticRunner
    phases: frozenset[Phase]
    rounds: int


# What is wrapped around a runner's first turn.
Watch = Callable[[StaticRunner], AbstractContextManager[None]]


def measure_parts(
    parts: Sequence[Part],
    tokens: Tokens,
    advance: Callable[[], None] = lambda: None,
    watch: Watch = lambda runner: nullcontext(),
) -> dict[str, Samples]:
    """Samples by the runners' names, as `measure_cell` takes them.

    `advance` is called after every turn of a runner. `watch` gives a context for its first turn,
    which is not timed.
    """
    samples = {part.runner.name: Samples() for part in parts}
    for part in parts:
        part.runner.reserve(tokens.prompt.shape[1] + tokens.continuation.shape[1])
    for number in range(-WARM_UP_ROUNDS, max(part.rounds for part in parts)):
        start = number % len(parts)
        for part in [*parts[start:], *parts[:start]]:
            if number >= part.rounds:
                continue
            if number < 0:
                with watch(part.runner):
                    _turn(part, tokens, Samples())
            else:
                _turn(part, tokens, samples[part.runner.name])
            advance()
    return samples


def _turn(part: Part, tokens: Tokens, samples: Samples) -> None:
    runner = part.runner
    with no_collection():
        if "prefill" in part.phases:
            samples.prefill.append(runner.clock(partial(runner.prefill, tokens.prompt)))
        else:
            runner.fill(*tokens.prompt.shape)
        if "decode" in part.phases:
            seconds = runner.clock(partial(runner.decode, tokens.continuation))
            samples.decode.append(seconds / tokens.continuation.shape[1])
