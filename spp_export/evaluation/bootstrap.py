"""Intervals by resampling documents: they, not tokens, are what was drawn independently.

Of few documents, percentiles of resampled means cover too little: resamples vary less than samples
do, by (n - 1) / n, and as if their variance were known. So the percentiles are moved outwards, to
where they would be those of Student's t if means were normal: the expanded percentile interval of
T. C. Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69(4),
2015.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
# Sums over a document: 8 digits leave 1e-5 nats per document of any length that is read.
_DIGITS = 8


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """Sums over the predicted tokens of each of N documents, all [N].

    tokens      predicted tokens; 0 for a document of one token or none
    dense_nll   negative log-likelihood under the dense model, in nats
    nll         the same under the row
    kl          KL(dense || row)
    agreed      tokens where both rank the same token first
    """

    tokens: FloatArray
    dense_nll: FloatArray
    nll: FloatArray
    kl: FloatArray
    agreed: FloatArray

    def to_dict(self) -> dict[str, list[float | None]]:
        """What differs from row to row; tokens and dense_nll stand in the dense row."""
        return {
            "nll": numbers(self.nll),
            "kl": numbers(self.kl),
            "agreed": numbers(self.agreed),
        }


def scores_from_json(
    dense: Mapping[str, Sequence[float | None]], row: Mapping[str, Sequence[float | None]]
) -> DocumentScores:
    """A row's scores from its record and the dense row's."""
    return DocumentScores(
        array(dense["tokens"]),
        array(dense["nll"]),
        array(row["nll"]),
        array(row["kl"]),
        array(row["agreed"]),
    )


def number(value: float) -> float | None:
    """A float of few digits for JSON, which cannot hold infinity or nan."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.{_DIGITS}g}")


def numbers(values: FloatArray | Sequence[float]) -> list[float | None]:
    """`number` of each."""
    return [number(float(value)) for value in values]


def array(values: Sequence[float | None]) -> FloatArray:
    """Back from JSON: what was not finite is nan."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


RESAMPLES = 2000
# Of each side that is left out.
_TAIL = 0.025


@dataclass(frozen=True)
class Interval:
    """A figure and the 95 % interval of its bootstrap; nan for a single document."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether the interval has two ends."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def side(self, level: float) -> int:
        """-1 where all of the interval is below a level, 1 where all is above, else 0."""
        return int(self.low > level) - int(self.high < level)

    def to_list(self) -> list[float]:
        """[value, low, high]."""
        return [self.value, self.low, self.high]


def perplexity(scores: DocumentScores) -> float:
    """exp of the mean negative log-likelihood; infinite where a float cannot hold it."""
    with np.errstate(all="ignore"):
        return float(np.exp(scores.nll.sum() / scores.tokens.sum()))


def perplexity_ratio(scores: DocumentScores, seed: int = 0) -> Interval:
    """exp(sum(nll - dense nll) / sum tokens): perplexity over the dense model's."""
    return _log_ratio(scores.nll - scores.dense_nll, scores.tokens, seed)


def paired_ratio(ours: DocumentScores, theirs: DocumentScores, seed: int = 0) -> Interval:
    """Perplexity of one row over another's on the same documents, resampled together."""
    return _log_ratio(ours.nll - theirs.nll, ours.tokens, seed)


def paired_kl(ours: DocumentScores, theirs: DocumentScores, seed: int = 0) -> Interval:
    """KL per token of one row less another's on the same documents, resampled together."""
    return weighted_mean(ours.kl - theirs.kl, ours.tokens, seed)


def mean_kl(scores: DocumentScores, seed: int = 0) -> Interval:
    """KL(dense || row) per token, in nats."""
    return weighted_mean(scores.kl, scores.tokens, seed)


def agreement(scores: DocumentScores, seed: int = 0) -> Interval:
    """Share of tokens where both models rank the same token first."""
    return weighted_mean(scores.agreed, scores.tokens, seed)


def weighted_mean(sums: FloatArray, counts: FloatArray, seed: int = 0) -> Interval:
    """sum of `sums` [N] over sum of `counts` [N], documents resampled."""
    return _interval(sums, counts, seed, lambda mean: mean)


def _log_ratio(sums: FloatArray, counts: FloatArray, seed: int) -> Interval:
    return _interval(sums, counts, seed, np.exp)


def _interval(
    sums: FloatArray, counts: FloatArray, seed: int, of: Callable[[FloatArray], FloatArray]
) -> Interval:
    predicted = counts > 0
    sums, counts = sums[predicted], counts[predicted]
    documents = len(sums)
    if documents == 0:
        return Interval(np.nan, np.nan, np.nan)
    # A model may be broken beyond what a float holds; its record then says so.
    with np.errstate(over="ignore", invalid="ignore"):
        value = float(of(np.asarray(sums.sum() / counts.sum())))
        if documents == 1 or not np.isfinite(sums).all():
            return Interval(value, np.nan, np.nan)
        # How often each document is drawn: equal seeds pair the resamples of two rows.
        drawn = np.random.default_rng(seed).multinomial(
            documents, np.full(documents, 1 / documents), size=RESAMPLES
        )
        tail = _expanded(documents)
        low, high = np.quantile(of((drawn @ sums) / (drawn @ counts)), (tail, 1 - tail))
    return Interval(value, float(low), float(high))


def _expanded(documents: int) -> float:
    """The quantile of resampled means to be taken for 2.5 %: Phi(-sqrt(n / (n - 1)) t)."""
    from scipy.special import ndtr, stdtrit

    degrees = documents - 1
    return float(ndtr(math.sqrt(documents / degrees) * stdtrit(degrees, _TAIL)))
