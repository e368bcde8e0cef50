"""`reap`: the mean length of what an expert writes, over the tokens that are routed to it.

REAP (Lasby et al., arXiv 2510.13999): `S = mean of g(x) ||f(x)|| over routed x`. It knows experts
only and prunes as many in each layer; here layers compete, and an expert that few tokens see counts
as much as one that many do. Heads and channels go by `energy`.
"""

from __future__ import annotations

import numpy as np

from spp_export.calibration.statistics import LayerStatistics
from spp_export.common.arrays import FloatArray
from spp_export.importance import energy
from spp_export.importance.base import Convention, Criterion, Need


def experts(statistics: LayerStatistics) -> FloatArray:
    """Scores [E] in units of the residual stream's norm; 0 of an expert that no token sees."""
    assert statistics.experts is not None
    seen = statistics.experts.routed.astype(np.float64)
    return statistics.experts.length / np.where(seen > 0, seen, 1.0)


CRITERION = Criterion(
    name="reap",
    source="REAP (arXiv 2510.13999); experts only",
    convention=Convention.OUTPUT_ONLY,
    heads=energy.heads,
    channels=energy.channels,
    needs=frozenset({Need.ACTIVATIONS}),
    comparable="stream",
    companion=energy.CRITERION.name,
    experts=experts,
    expert_channels=energy.expert_channels,
)
