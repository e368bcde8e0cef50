"""How many units Probe Pruning removes per layer (ICLR 2025, arXiv 2502.15618).

The first layers are never pruned, so the others lose more than the ratio asked for.
"""

from __future__ import annotations

import math

from spp_export.common.errors import UsageError

# Products such as 0.29 * 100 fall short of the whole number they stand for.
_ROUNDING = 1e-9


def depth_corrected(ratio: float, layers: int, skipped: int = 3) -> float:
    """The share to remove from each of the layers that are pruned, to two decimals.

    UsageError where they cannot make up for the skipped ones.
    """
    share = round(layers / (layers - skipped) * ratio, 2) if layers > skipped else math.inf
    if share >= 1:
        raise UsageError(
            f"Probe Pruning spares the first {skipped} layers, so a ratio of {ratio:g} is more than"
            f" the other {max(layers - skipped, 0)} can give; lower the ratio"
        )
    return share


def heads_dropped(share: float, heads: int) -> int:
    """Heads removed of `heads`, rounded down."""
    return math.floor(share * heads + _ROUNDING)


def channels_kept(share: float, channels: int, multiple: int = 64) -> int:
    """Channels that stay of `channels`: fewer are removed until a multiple stays."""
    kept = channels - math.floor(share * channels + _ROUNDING)
    return min(math.ceil(kept / multiple) * multiple, channels)
