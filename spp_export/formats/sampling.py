"""Which token follows, by the logits of a model of any format."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import UsageError

Ids = NDArray[np.int64]
# Logits [B,V] of the next token -> the token of each row [B].
Chooser = Callable[[NDArray[np.floating]], Ids]


def greedy(logits: NDArray[np.floating]) -> Ids:
    """The most likely token of each row; the first of equals."""
    return np.asarray(logits.argmax(-1), np.int64)


class Sampling:
    """A chooser that draws from the distribution, cut and sharpened as transformers does it.

    In this order: logits are divided by `temperature`; all but the `top_k` greatest are dropped,
    equals of the last one kept; then the least likely ones are dropped whose probabilities add up
    to no more than 1 - `top_p`. Temperature 0 is greedy, `top_k` 0 and `top_p` 1 drop nothing.

    Draws go on from one call to the next; another Sampling of the same seed repeats them.
    Raises UsageError for values out of range.
    """

    def __init__(
        self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
    ) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise UsageError(f"temperature {temperature}: expected 0 or more.")
        if top_k < 0:
            raise UsageError(f"top-k {top_k}: expected 0 or more.")
        if not 0 < top_p <= 1:
            raise UsageError(f"top-p {top_p}: expected more than 0 and at most 1.")
        if seed < 0:
            raise UsageError(f"seed {seed}: expected 0 or more.")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: NDArray[np.floating]) -> Ids:
        """One token per row of logits [B,V]."""
        if self.temperature == 0:
            return greedy(logits)
        kept = (self.candidates(row) for row in logits)
        return np.array([self._random.choice(ids, p=chances) for ids, chances in kept], np.int64)

    def candidates(self, logits: NDArray[np.floating]) -> tuple[Ids, NDArray[np.float64]]:
        """Tokens that may follow by logits [V], and their probabilities. Temperature above 0."""
        scores = logits.astype(np.float64)
        # The greatest becomes 0 first, so that the smallest temperature cannot overflow it.
        scores = (scores - scores.max()) / self.temperature
        tokens = np.arange(scores.size)
        if 0 < self.top_k < scores.size:
            least = np.partition(scores, -self.top_k)[-self.top_k]
            tokens = np.flatnonzero(scores >= least)
        chances = np.exp(scores[tokens])
        chances /= chances.sum()
        if self.top_p < 1:
            order = np.argsort(chances, kind="stable")
            kept = chances[order].cumsum() > 1 - self.top_p
            kept[-1] = True
            tokens, chances = tokens[order[kept]], chances[order[kept]]
            chances /= chances.sum()
        return tokens, chances
