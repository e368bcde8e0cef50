"""`axis`: the share of a unit's write that lies along the domain's probe axis.

SubspacePath Pruner (ICML 2026), Eq. 5: `I = E (u . w)^2 / (||w||^2 + eps)`, u of unit length.
Output-only. The paper scores heads. A channel always writes along its column of down_proj, so its
share is `cos^2(u, Wd_c)` for every token; a column of zeros has none.

A share is blind to how much a unit writes; as a reason to remove heads it does worse than chance on
the default model, so it is here for comparison and never the default.
"""

from __future__ import annotations

import numpy as np

from spp_export.calibration.statistics import LayerStatistics
from spp_export.common.arrays import FloatArray
from spp_export.importance.base import Convention, Criterion, Need
from spp_export.importance.units import column_squares


def heads(statistics: LayerStatistics) -> FloatArray:
    """Scores [H], each in [0,1]."""
    assert statistics.axis is not None
    return statistics.axis.share.astype(np.float64)


def channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [I], each in [0,1]."""
    assert statistics.axis is not None
    down = statistics.weights.down
    along = np.square(statistics.axis.direction.astype(np.float64) @ down)
    squares = column_squares(down)
    return along / np.where(squares > 0, squares, 1.0)


CRITERION = Criterion(
    name="axis",
    source="SubspacePath Pruner (ICML 2026), Eq. 5",
    convention=Convention.OUTPUT_ONLY,
    heads=heads,
    channels=channels,
    needs=frozenset({Need.AXIS}),
)
