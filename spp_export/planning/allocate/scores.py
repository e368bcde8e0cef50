"""Scores of one kind of unit, checked and ready to be added up."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spp_export.common.arrays import FloatArray, IntArray
from spp_export.common.errors import PlanError
from spp_export.planning.knapsack import on_grid

_LARGEST_SCORE = 1e100


def per_parameter(scores_LU: ArrayLike, parameters: float) -> FloatArray:
    """Worth [L,U] of units of `parameters` each whose scores say how much a parameter is worth.

    For criteria whose scores only rank units: heads and channels then compete as in FLAP (An et
    al., arXiv 2312.11983), where one threshold on the score holds for all of them and each counts
    by its cost. A number added to all scores adds as much as the budget allows to every choice
    that uses it up, so it changes none of them.
    """
    return np.asarray(scores_LU, dtype=np.float64) * parameters


def checked(scores_LU: ArrayLike, layers: int, units: int, *, unit: str, plural: str) -> FloatArray:
    """Scores [L,U] on a grid where their sums are exact; PlanError unless they fit and are finite.

    unit and plural name what is scored.
    """
    scores = np.asarray(scores_LU, dtype=np.float64)
    if scores.shape != (layers, units):
        raise PlanError(
            f"scores have shape {list(scores.shape)} but the model needs {[layers, units]} "
            f"(layers, {plural}). Use artifacts made for this model."
        )
    if not (ordinary := np.abs(scores) <= _LARGEST_SCORE).all():
        layer, index = np.argwhere(~ordinary)[0]
        raise PlanError(
            f"layer {layer}: the score of {unit} {index} is {scores[layer, index]}, expected a "
            f"finite number of at most {_LARGEST_SCORE:g}. Make the artifacts again."
        )
    return on_grid(scores, scores.size)


def places(order: NDArray[np.intp], axis: int) -> IntArray:
    """Place of every entry in `order` along `axis`: the inverse permutation."""
    axis %= order.ndim
    along = np.arange(order.shape[axis]).reshape(
        [-1 if i == axis else 1 for i in range(order.ndim)]
    )
    rank = np.empty(order.shape, dtype=np.int64)
    np.put_along_axis(rank, order, np.broadcast_to(along, order.shape), axis=axis)
    return rank
