"""The greedy choice of K among candidate domains, by separation and coverage.

The objective of a set S of candidates is `w * coverage(S) + (1 - w) * separation(S)`, both in
[0,1]. Coverage is a facility-location function, the mean over all candidates' texts of the largest
positive cosine with a chosen axis, each candidate counting alike: domains that speak for the others
add most (submodular; Nemhauser, Wolsey and Fisher 1978). Separation is one minus the mean |cosine|
between chosen axes: near-orthogonal ones tell texts apart best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from spp_export.common.arrays import FloatArray
from spp_export.common.errors import UsageError
from spp_export.domains.axes import Space, unit

COVERAGE_WEIGHT = 0.5


@dataclass(frozen=True)
class SelectionStep:
    """One candidate taken: its index, the set's figures with it, and what the objective gained."""

    candidate: int
    coverage: float
    separation: float
    gain: float

    def to_dict(self, name: str) -> dict[str, Any]:
        """For the manifest."""
        return {
            "domain": name,
            "coverage": round(self.coverage, 6),
            "separation": round(self.separation, 6),
            "gain": round(self.gain, 6),
        }


def select_domains(
    space: Space, count: int, weight: float = COVERAGE_WEIGHT
) -> tuple[SelectionStep, ...]:
    """`count` candidates, each the one that adds most to the objective; the first among equals.

    Raises UsageError as `check_count` does.
    """
    candidates = len(space.centres)
    check_count(count, candidates)
    served_NC = _served(space)
    cosine_CC = np.abs(space.cosines)
    chosen: list[int] = []
    steps: list[SelectionStep] = []
    reached = 0.0
    for _ in range(count):
        best: SelectionStep | None = None
        for candidate in range(candidates):
            if candidate in chosen:
                continue
            members = [*chosen, candidate]
            coverage = _coverage(served_NC, space, members)
            separation = _separation(cosine_CC, members)
            gain = weight * coverage + (1 - weight) * separation - reached
            if best is None or gain > best.gain + 1e-12:
                best = SelectionStep(candidate, coverage, separation, gain)
        assert best is not None
        chosen.append(best.candidate)
        reached += best.gain
        steps.append(best)
    return tuple(steps)


def check_count(count: int, candidates: int) -> None:
    """UsageError for a count that is not between one and the number of candidates."""
    if not 1 <= count <= candidates:
        raise UsageError(
            f"--select {count}: expected a number from 1 to {candidates}, "
            "the number of candidate domains."
        )


def _served(space: Space) -> FloatArray:
    """How well each axis serves each text [N,C]: the positive part of their cosine."""
    offset = space.texts - space.centres.mean(axis=0)
    return np.maximum(unit(offset) @ space.axes.T, 0.0)


def _coverage(served_NC: FloatArray, space: Space, members: list[int]) -> float:
    best_N = served_NC[:, members].max(axis=1)
    return float(np.mean([best_N[space.labels == k].mean() for k in range(len(space.centres))]))


def _separation(cosine_CC: FloatArray, members: list[int]) -> float:
    """One minus the mean |cosine| over pairs; one for a single member."""
    count = len(members)
    if count < 2:
        return 1.0
    among = cosine_CC[np.ix_(members, members)]
    pairs = among[np.triu_indices(count, 1)]
    return 1.0 - float(pairs.mean())
