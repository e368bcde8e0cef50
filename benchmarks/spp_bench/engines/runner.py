"""What runs a model for the bench."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spp_bench.cases import Ids
from spp_bench.clocks import Clock

Logits = NDArray[np.float32]


class Runner(Protocol):
    """A loaded model with a cache of its own.

    `clock` times its calls; where it is the wall clock, they return when the work is done.
    """

    name: str
    clock: Clock

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that are loaded."""

    def reserve(self, length: int) -> None:
        """Make room, from the next prefill on, for `length` tokens per sequence."""

    def prefill(self, ids: Ids) -> Any:
        """Begin anew with prompts [B,S]; the logits in whatever form the engine has them."""

    def decode(self, ids: Ids) -> Any:
        """One step for each column of [B,N], tokens that are given and not chosen."""

    def logits(self) -> Logits:
        """Logits [B,V] at the last token fed."""

    def kv_bytes(self) -> int:
        """Bytes that the cache holds now."""

    def forget(self) -> None:
        """Free the cache."""
