"""Compensates for removed inputs of `o_proj` and `down_proj`: closed forms, no training.

A linear layer y = W a, with W [d, m], loses the inputs outside `kept`. What they contributed is
partly predictable: by its mean (`bias`), or from the inputs that stay (`refit`). The many inputs of
`down_proj` are predicted from those of their own block alone (`refit_blocks`), since all their
second moments together would not fit in memory.

What blocks give up: with C the whole moments, B their diagonal blocks and D = W - W'P what the slim
layer lacks, the loss is tr(D C D^T) and the one that `refit_blocks` makes small is tr(D B D^T).
That one is never above the plain slice's. Where inputs of different blocks are uncorrelated,
C = B, so the loss itself is never above the slice's either, nor below the least, which is `refit`
on C without a ridge. Where they are correlated, all that holds is C <= n B for n blocks (as for any
positive semidefinite matrix), so the loss is at most n times the one on B, and it can be above the
slice's. Measure it on the model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np

from spp_export.common.arrays import BoolArray, FloatArray, IndexArray
from spp_export.common.errors import ArtifactsError, UsageError

_BLOCK = 256
_log = logging.getLogger(__name__)


def bias(weight: FloatArray, mean: FloatArray, removed: Sequence[int] | IndexArray) -> FloatArray:
    """Mean output of the removed inputs, W[:,P] mean[P], to be added as a bias: [d] float64.

    `weight` is [d, m], `mean` [m] the inputs' mean, `removed` the indices P of inputs that go.
    From An et al., "Fluctuation-based Adaptive Structured Pruning" (FLAP), arXiv 2312.11983.
    Raises ArtifactsError for a mean that does not fit or is not finite.
    """
    inputs = weight.shape[1]
    if mean.shape != (inputs,) or not np.isfinite(mean).all():
        raise ArtifactsError(
            f"the mean of a layer's inputs must be {inputs} finite numbers, got shape "
            f"{list(mean.shape)}. Make the artifacts again for this model."
        )
    gone = _indices(removed, inputs)
    return weight[:, gone].astype(np.float64) @ mean[gone].astype(np.float64)


def refit(
    weight: FloatArray, moments: FloatArray, kept: Sequence[int] | IndexArray, ridge: float = 0.01
) -> FloatArray:
    """Weights on the kept inputs that best reproduce the whole layer's output: [d, |S|] float64.

    `weight` is W [d, m], `moments` C = E[a a^T] [m, m], `kept` the indices S of inputs that stay,
    R the rest. With lam = ridge * mean(diag C[S,S]), the result is

        W' = W_S + W_R C[R,S] (C[S,S] + lam I)^-1,

    which minimises E||W a - W' a_S||^2 + lam ||W' - W_S||^2. Shrinking towards the plain slice
    W_S rather than towards zero makes it never worse than the slice on these moments, and equal
    to it for an infinite ridge. Where C[S,S] + lam I is singular the smallest change is taken.

    Raises ArtifactsError for moments that do not fit, are not finite or are no moments.
    """
    if not (math.isfinite(ridge) and ridge >= 0):
        raise UsageError(f"the ridge must be a finite number of at least 0, got {ridge}.")
    _check_moments(weight, moments)
    stay = _indices(kept, weight.shape[1])
    gone = np.setdiff1d(np.arange(weight.shape[1]), stay)
    sliced = weight[:, stay].astype(np.float64)
    if not gone.size or not stay.size:
        return sliced
    among = moments[np.ix_(stay, stay)].astype(np.float64)
    across = moments[np.ix_(stay, gone)].astype(np.float64)
    among[np.diag_indices_from(among)] += ridge * float(np.mean(np.diag(among)))
    predicted = _solve(among, across)
    sliced += weight[:, gone].astype(np.float64) @ predicted.T
    return sliced


def refit_blocks(
    weight: FloatArray, blocks: FloatArray, kept: Sequence[int] | IndexArray, ridge: float = 0.01
) -> FloatArray:
    """`refit` of every block of inputs by itself: [d, |S|] float64, columns in the order of `kept`.

    `blocks` [n, b, b] are the diagonal blocks of the moments: block i is of the inputs i*b to
    (i+1)*b - 1, the last one padded. A block of which nothing is kept contributes nothing. One
    block is `refit`. Raises as `refit` does.
    """
    _check_blocks(weight, blocks)
    stay = _indices(kept, weight.shape[1])
    refitted = np.empty((len(weight), stay.size))
    for columns, moments, inside in _blocks(weight, blocks, stay):
        here = stay[inside] - columns.start
        refitted[:, inside] = refit(weight[:, columns], moments, here, ridge)
    return refitted


def residual_blocks(
    weight: FloatArray, blocks: FloatArray, kept: Sequence[int] | IndexArray, refitted: FloatArray
) -> float:
    """`residual` with the correlation of inputs of different blocks taken for nil.

    Arguments as of `refit_blocks`. One block is `residual`.
    """
    _check_blocks(weight, blocks)
    stay = _indices(kept, weight.shape[1])
    lost = energy = 0.0
    for columns, moments, inside in _blocks(weight, blocks, stay):
        _check_moments(weight[:, columns], moments)
        whole = weight[:, columns].astype(np.float64)
        energy += _energy(whole, moments)
        whole[:, stay[inside] - columns.start] -= refitted[:, inside]
        lost += _energy(whole, moments)
    # Rounding can leave a tiny negative number where nothing is lost.
    return max(0.0, lost / energy) if energy > 0 else 0.0


def residual(
    weight: FloatArray, moments: FloatArray, kept: Sequence[int] | IndexArray, refitted: FloatArray
) -> float:
    """Share of the output's energy that is lost: 0 is none, 1 is as if the layer wrote nothing.

    tr((W - W'P) C (W - W'P)^T) / tr(W C W^T), where W' is `refitted` [d, |S|] and P picks `kept`.
    Raises ArtifactsError as `refit` does.
    """
    _check_moments(weight, moments)
    return residual_blocks(weight, moments[None], kept, refitted)


def _blocks(
    weight: FloatArray, blocks: FloatArray, stay: IndexArray
) -> Iterator[tuple[slice, FloatArray, BoolArray]]:
    """Per block: its inputs, their moments without padding, and which of `stay` are among them."""
    inputs, size = weight.shape[1], blocks.shape[1]
    for index, block in enumerate(blocks):
        first, last = index * size, min((index + 1) * size, inputs)
        moments = block[: last - first, : last - first]
        yield slice(first, last), moments, (stay >= first) & (stay < last)


def _energy(weight: FloatArray, moments: FloatArray) -> float:
    """tr(W C W^T), with C taken to float64 a few columns at a time."""
    total = 0.0
    for start in range(0, len(moments), 4 * _BLOCK):
        columns = slice(start, start + 4 * _BLOCK)
        part = weight @ moments[:, columns].astype(np.float64)
        total += float(np.vdot(part, weight[:, columns]))
    return total


def _solve(matrix: FloatArray, right: FloatArray) -> FloatArray:
    """X with `matrix` X = `right`, for a symmetric matrix with no negative eigenvalue."""
    from scipy.linalg import cho_factor, cho_solve  # 0.2 s, which a plan without re-fit spares

    try:
        factor, lower = cho_factor(matrix, lower=True)
    except np.linalg.LinAlgError:
        return _solve_singular(matrix, right)
    pivots = np.square(np.diag(factor))
    if pivots.min() <= len(matrix) * np.finfo(np.float64).eps * pivots.max():
        return _solve_singular(matrix, right)
    solution: FloatArray = cho_solve((factor, lower), right)
    return solution


def _solve_singular(matrix: FloatArray, right: FloatArray) -> FloatArray:
    """The smallest of the least-squares solutions, by the pseudo-inverse."""
    _log.warning(
        "the moments of %d kept inputs are singular; took the smallest change that fits. "
        "More calibration text or a larger ridge avoids this.",
        len(matrix),
    )
    values, vectors = np.linalg.eigh(matrix)
    significant = values > len(matrix) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    if values[0] < -1e-3 * max(values[-1], 0.0):
        raise ArtifactsError(
            f"the moments have a negative eigenvalue ({values[0]:.3g}, the largest is "
            f"{values[-1]:.3g}), which no second moments have. Make the artifacts again."
        )
    basis = vectors[:, significant]
    return np.asarray(basis @ ((basis.T @ right) / values[significant, None]))


def _check_blocks(weight: FloatArray, blocks: FloatArray) -> None:
    inputs = weight.shape[1]
    count, size = blocks.shape[0], blocks.shape[-1]
    if blocks.shape != (count, size, size) or not 0 <= count * size - inputs < size:
        raise ArtifactsError(
            f"the blocks of moments are {list(blocks.shape)}, expected [n, b, b] that cover "
            f"{inputs} inputs. Make the artifacts again for this model."
        )


def _check_moments(weight: FloatArray, moments: FloatArray) -> None:
    inputs = weight.shape[1]
    if moments.shape != (inputs, inputs):
        raise ArtifactsError(
            f"the moments are {list(moments.shape)}, expected [{inputs}, {inputs}] for this "
            "layer. Make the artifacts again for this model."
        )
    if not all(np.isfinite(moments[i : i + _BLOCK]).all() for i in range(0, inputs, _BLOCK)):
        raise ArtifactsError("the moments hold a value that is not finite. Make them again.")
    if np.diag(moments).min() < 0:
        raise ArtifactsError("the moments hold a negative mean square. Make them again.")


def _indices(values: Sequence[int] | IndexArray, count: int) -> IndexArray:
    indices = np.asarray(values, dtype=np.intp)
    assert ((indices >= 0) & (indices < count)).all(), "an index is out of range"
    assert np.unique(indices).size == indices.size, "an index appears twice"
    return indices
