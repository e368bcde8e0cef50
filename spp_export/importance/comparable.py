"""Scores of one layer against scores of another: the choice that decides where units go.

Residual writes grow with depth, so raw scores of different layers are not comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from spp_export.common.arrays import FloatArray


def standardised(scores_LU: FloatArray) -> FloatArray:
    """Zero mean and unit deviation inside each layer."""
    mean = scores_LU.mean(axis=1, keepdims=True)
    deviation = scores_LU.std(axis=1, keepdims=True)
    # A layer whose units all score alike says nothing about which to keep.
    z: FloatArray = (scores_LU - mean) / np.where(deviation > 0, deviation, 1.0)
    return z


def share(scores_LU: FloatArray) -> FloatArray:
    """Each unit's share of its layer's sum."""
    total = scores_LU.sum(axis=1, keepdims=True)
    return scores_LU / np.where(total > 0, total, 1.0)


def raw(scores_LU: FloatArray) -> FloatArray:
    """The scores as they are, for criteria already in one currency."""
    return scores_LU


def stream(scores_LU: FloatArray, sensitivity_L: FloatArray) -> FloatArray:
    """Norms of writes into the residual stream to the relative energy that goes with the unit.

    sensitivity_L: `E 1/||r||^2` of the stream r at the place where the layer's units write.
    """
    return scores_LU**2 * sensitivity_L[:, None]


_BY_SCORES: Mapping[str, Callable[[FloatArray], FloatArray]] = {
    "standardised": standardised,
    "share": share,
    "raw": raw,
    # For criteria that standardise by themselves.
    "shifted": raw,
}
# Moved so that the lowest of all is zero: without that a regular shape with fewer heads would win
# by dropping negative scores.
_MOVED = ("standardised", "shifted")
COMPARABLE = (*_BY_SCORES, "stream")
LOSSES = ("raw", "stream")
"""Ways that leave a loss: it is what a unit is worth. Other scores rank units, by parameter."""


def comparable(
    scores_LU: FloatArray, how: str = "standardised", *, sensitivity_L: FloatArray | None = None
) -> FloatArray:
    """Scores [L,U] made comparable across layers by one of `COMPARABLE`.

    `stream` asks for the layers' sensitivities [L].
    """
    (result,) = comparable_kinds((scores_LU,), how, (sensitivity_L,))
    return result


def comparable_kinds(
    kinds: Sequence[FloatArray],
    how: str = "standardised",
    sensitivities: Sequence[FloatArray | None] | None = None,
) -> tuple[FloatArray, ...]:
    """As `comparable` for several kinds of units that compete, each [L,U] with its sensitivities.

    Each kind is standardised by itself; the lowest score of all kinds becomes zero, so that one
    threshold holds for all of them.
    """
    scores = [np.asarray(kind, dtype=np.float64) for kind in kinds]
    if how == "stream":
        known = [np.asarray(layers) for layers in sensitivities or () if layers is not None]
        assert len(known) == len(scores), "stream asks for sensitivities"
        return tuple(stream(kind, layers) for kind, layers in zip(scores, known, strict=True))
    compared = [_BY_SCORES[how](kind) for kind in scores]
    lowest = min(float(kind.min()) for kind in compared) if how in _MOVED else 0.0
    return tuple(kind - lowest for kind in compared)
