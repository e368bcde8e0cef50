"""Reads conversations into a running model, each token once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import ModelError
from spp_export.formats.format import Feed, RunningModel

# Room that is reserved at once for a growing conversation.
_CAPACITY_STEP = 512


class Reader:
    """Reads prompts into a model's cache, skipping what the cache holds already."""

    def __init__(self, model: RunningModel) -> None:
        self._model = model
        self._feed: Feed | None = None
        self._capacity = 0
        self._read: list[int] = []

    def prompt(self, ids: Sequence[int], new_tokens: int) -> NDArray[Any]:
        """Logits [V] after a whole prompt that at most `new_tokens` tokens will follow."""
        needed = len(ids) + new_tokens
        known = len(self._read)
        goes_on = list(ids[:known]) == self._read and known < len(ids)
        if self._feed is None or not goes_on or needed > self._capacity:
            self.forget()
            self._capacity = self.capacity(needed)
            self._feed = self._model.start(self._capacity)
        return self.more(ids[len(self._read) :])

    def capacity(self, tokens: int) -> int:
        """The room that is reserved where so many tokens are needed."""
        steps = -(-tokens // _CAPACITY_STEP)
        return min(steps * _CAPACITY_STEP, self._model.context_length)

    def more(self, ids: Sequence[int]) -> NDArray[Any]:
        """Logits [V] after these further tokens."""
        assert self._feed is not None
        logits = self._feed(ids)
        self._read += ids
        if np.isnan(logits.max()):
            self.forget()
            raise ModelError(
                "the model's logits are not numbers: its values leave the range of the precision "
                "it runs in. Use --dtype float32, or export it in fp32."
            )
        return logits

    def forget(self) -> None:
        """Drop the cache, for example after an interrupted step left it half written."""
        self._feed, self._read = None, []
