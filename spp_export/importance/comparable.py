"""Scores of one layer against scores of another: the choice that decides where heads go.

Residual writes grow with depth, so raw scores of different layers are not comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from spp_export.importance.statistics import FloatArray


def standardised(scores_LH: FloatArray) -> FloatArray:
    """Zero mean and unit deviation inside each layer, shifted so that the lowest of all is zero.

    Without the shift a regular shape with fewer heads would win by dropping negative scores.
    """
    mean = scores_LH.mean(axis=1, keepdims=True)
    deviation = scores_LH.std(axis=1, keepdims=True)
    # A layer whose heads all score alike says nothing about which to keep.
    z = (scores_LH - mean) / np.where(deviation > 0, deviation, 1.0)
    shifted: FloatArray = z - z.min()
    return shifted


def share(scores_LH: FloatArray) -> FloatArray:
    """Each head's share of its layer's sum."""
    total = scores_LH.sum(axis=1, keepdims=True)
    return scores_LH / np.where(total > 0, total, 1.0)


def raw(scores_LH: FloatArray) -> FloatArray:
    """The scores as they are, for criteria already in one currency."""
    return scores_LH


COMPARABLE: Mapping[str, Callable[[FloatArray], FloatArray]] = {
    "standardised": standardised,
    "share": share,
    "raw": raw,
}


def comparable(scores_LH: FloatArray, how: str = "standardised") -> FloatArray:
    """Scores [L,H] made comparable across layers by one of `COMPARABLE`."""
    return COMPARABLE[how](np.asarray(scores_LH, dtype=np.float64))
