"""What is kept of every document under a row: enough to compute any interval again. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    """A float of few digits for JSON, which has no word for infinity or nan."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.{_DIGITS}g}")


def numbers(values: FloatArray | Sequence[float]) -> list[float | None]:
    """`number` of each."""
    return [number(float(value)) for value in values]


def array(values: Sequence[float | None]) -> FloatArray:
    """Back from JSON: what was not finite is nan."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
