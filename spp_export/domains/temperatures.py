"""Temperatures of the probes, and how far their probabilities can be believed.

Every regime has its own held-out text and targets: one domain (in-domain), several
(cross-domain), none of those known (out-of-domain).
"""

from __future__ import annotations

from typing import Any

import numpy as np

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]

BINS = 10
_LOWEST, _HIGHEST, _STEPS = 0.05, 20.0, 60


def fit_temperatures(logits_NLK: FloatArray, targets_NK: FloatArray) -> FloatArray:
    """One temperature per layer [L] that minimises the one-vs-rest loss on held-out text.

    `targets_NK` holds 1 where a text is of a domain; any number of them in a row, or none. After
    Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599. The loss is convex in
    1/T, so a golden-section search over log T from 0.05 to 20 finds its minimum.
    """
    logits = logits_NLK.astype(np.float64)

    def loss(log_t_L: FloatArray) -> FloatArray:
        scaled = logits / np.exp(log_t_L)[None, :, None]
        value = np.logaddexp(0.0, scaled) - targets_NK[:, None, :] * scaled
        result: FloatArray = value.mean(axis=(0, 2))
        return result

    ratio = (5**0.5 - 1) / 2
    low = np.full(logits.shape[1], np.log(_LOWEST))
    high = np.full(logits.shape[1], np.log(_HIGHEST))
    for _ in range(_STEPS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        lower = loss(left) <= loss(right)
        low, high = np.where(lower, low, left), np.where(lower, right, high)
    return np.exp((low + high) / 2).astype(np.float32)


def calibration_error(probabilities_N: FloatArray, outcomes_N: FloatArray) -> float:
    """Expected calibration error of probabilities against outcomes of 0 or 1.

    Ten bins of equal width over [0,1]; the mean over all values of |mean probability - share of
    ones| in its bin (Naeini et al. 2015; arXiv 1706.04599, Eq. 3).
    """
    bins = np.minimum((probabilities_N * BINS).astype(np.intp), BINS - 1)
    gap = np.bincount(bins, weights=probabilities_N - outcomes_N, minlength=BINS)
    return float(np.abs(gap).sum() / len(probabilities_N))


def reliability(logits_NLK: FloatArray, targets_NK: FloatArray) -> dict[str, Any]:
    """Calibration error before (T = 1) and after scaling, the mean over layers.

    All one-vs-rest probabilities of a layer count alike. Cross-fitted: a temperature fitted on
    every second text is judged on the others, and the other way round.
    """
    fold_N = np.arange(len(logits_NLK)) % 2
    if len(logits_NLK) < 2:
        return {"texts": len(logits_NLK)}
    before: list[float] = []
    after: list[float] = []
    for fold in (0, 1):
        judged = fold_N == fold
        temperature_L = fit_temperatures(logits_NLK[~judged], targets_NK[~judged])
        for errors, scale_L in ((before, np.ones_like(temperature_L)), (after, temperature_L)):
            errors.append(_mean_error(logits_NLK[judged], targets_NK[judged], scale_L))
    return {
        "texts": len(logits_NLK),
        "ece_before": round(float(np.mean(before)), 6),
        "ece_after": round(float(np.mean(after)), 6),
    }


def _mean_error(logits_NLK: FloatArray, targets_NK: FloatArray, scale_L: FloatArray) -> float:
    scaled = logits_NLK.astype(np.float64) / scale_L[None, :, None]
    probabilities = np.exp(-np.logaddexp(0.0, -scaled))
    outcomes = targets_NK.reshape(-1)
    errors = [
        calibration_error(probabilities[:, layer].reshape(-1), outcomes)
        for layer in range(len(scale_L))
    ]
    return float(np.mean(errors))
