"""`magnitude`: the size of a unit's weights, without any text.

`I_c = ||W[:,c]||_2` on o_proj and down_proj, a head's score the sum over its dh columns: the
data-free baseline of FLAP's repository (arXiv 2312.11983). Output-only.
"""

from __future__ import annotations

import numpy as np

from spp_export.calibration.statistics import LayerStatistics
from spp_export.common.arrays import FloatArray
from spp_export.importance.base import Convention, Criterion
from spp_export.importance.units import column_squares, per_head


def heads(statistics: LayerStatistics) -> FloatArray:
    """Scores [H]."""
    return per_head(np.sqrt(column_squares(statistics.weights.output)), statistics.heads)


def channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [I]."""
    return np.sqrt(column_squares(statistics.weights.down))


def expert_channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [E,F]."""
    assert statistics.expert_columns is not None
    return np.sqrt(statistics.expert_columns.squares.astype(np.float64))


CRITERION = Criterion(
    name="magnitude",
    source="L2 norm of columns, the baseline of FLAP's code",
    convention=Convention.OUTPUT_ONLY,
    heads=heads,
    channels=channels,
    expert_channels=expert_channels,
)
