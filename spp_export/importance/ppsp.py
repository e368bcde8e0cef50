"""`ppsp`: Probe Pruning's metric on calibration statistics.

Probe Pruning (ICLR 2025, arXiv 2502.15618): a weight's score is `W[i,c]^2 V_c` with V_c the energy
of input c, and a unit's the L2 norm of its weights' scores in o_proj or down_proj:
`I_h = sqrt(sum_{c in h} V_c^2 sum_i Wo[i,c]^4)` and `I_c = V_c sqrt(sum_i Wd[i,c]^4)`. Output-only.

This is its static form: V is the mean over the collection's tokens. The paper sums a batch's probe,
fused with history, over positions instead; how many tokens there are is one constant for all units.
"""

from __future__ import annotations

import numpy as np

from spp_export.calibration.statistics import LayerStatistics
from spp_export.common.arrays import FloatArray
from spp_export.importance.base import Convention, Criterion, Need
from spp_export.importance.units import per_head


def head_scores(output: FloatArray, energy: FloatArray, heads: int) -> FloatArray:
    """Scores [H] from o_proj [d,H*dh] and the energy V [H*dh] of its input."""
    return np.sqrt(per_head(np.square(energy, dtype=np.float64) * _fourth(output), heads))


def channel_scores(down: FloatArray, energy: FloatArray) -> FloatArray:
    """Scores [I] from down_proj [d,I] and the energy V [I] of its input."""
    return energy * np.sqrt(_fourth(down))


def _fourth(matrix: FloatArray) -> FloatArray:
    sums: FloatArray = np.einsum("ic,ic,ic,ic->c", *[matrix] * 4, dtype=np.float64)
    return sums


def heads(statistics: LayerStatistics) -> FloatArray:
    """Scores [H]."""
    assert statistics.attention is not None
    return head_scores(statistics.weights.output, statistics.attention.square, statistics.heads)


def channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [I]."""
    assert statistics.mlp is not None
    return channel_scores(statistics.weights.down, statistics.mlp.square)


CRITERION = Criterion(
    name="ppsp",
    source="Probe Pruning (ICLR 2025), PPsp on calibration statistics",
    convention=Convention.OUTPUT_ONLY,
    heads=heads,
    channels=channels,
    needs=frozenset({Need.ACTIVATIONS}),
)
