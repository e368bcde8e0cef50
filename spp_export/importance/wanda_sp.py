"""`wanda-sp`: structured Wanda, the sum of Wanda's scores over a unit's columns.

Wanda (arXiv 2306.11695) scores a weight `|W[i,c]| n_c`, with n_c the norm of input c. Wanda-sp is
its structured form in the repositories of FLAP and Probe Pruning: `I_c = n_c ||W[:,c]||_1` on
o_proj and down_proj, a head's score the sum over its dh columns. Output-only, so the same under
GQA.

Choices: the sum over rows, as in Probe Pruning (FLAP's mean ranks alike); n_c is the root mean
square over tokens rather than over sequences, which is one constant for all columns.
"""

from __future__ import annotations

import numpy as np

from spp_export.calibration.statistics import LayerStatistics
from spp_export.common.arrays import FloatArray
from spp_export.importance.base import Convention, Criterion, Need
from spp_export.importance.units import column_sums, per_head


def heads(statistics: LayerStatistics) -> FloatArray:
    """Scores [H]."""
    assert statistics.attention is not None
    columns = column_sums(statistics.weights.output) * np.sqrt(statistics.attention.square)
    return per_head(columns, statistics.heads)


def channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [I]."""
    assert statistics.mlp is not None
    return column_sums(statistics.weights.down) * np.sqrt(statistics.mlp.square)


def expert_channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [E,F]."""
    assert statistics.expert_inputs is not None
    assert statistics.expert_columns is not None
    sums = statistics.expert_columns.sums.astype(np.float64)
    return sums * np.sqrt(statistics.expert_inputs.square)


CRITERION = Criterion(
    name="wanda-sp",
    source="Wanda (arXiv 2306.11695) in the structured form of FLAP's and Probe Pruning's code",
    convention=Convention.OUTPUT_ONLY,
    heads=heads,
    channels=channels,
    needs=frozenset({Need.ACTIVATIONS}),
    expert_channels=expert_channels,
)
