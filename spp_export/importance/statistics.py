"""What one pass over the pools leaves behind for the criteria."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class HeadStatistics:
    """Per domain (K), layer (L) and query head (H), averages over the domain's real tokens.

    A head's write is `w = Wo[:, C(h)] a[C(h)]`, its own addition to the residual stream.

    write_energy [K,L,H]  E ||w||^2
    axis_share   [K,L,H]  E (u_k . w)^2 / (||w||^2 + eps), u_k the unit probe axis of the domain
    tokens       [K]      real tokens seen
    """

    write_energy: FloatArray
    axis_share: FloatArray
    tokens: tuple[int, ...]
