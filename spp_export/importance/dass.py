"""`dass`: channels by their own activation norm in all three matrices of the MLP.

DaSS (TMLR 2025, arXiv 2405.01943): with nz_c the norm of channel c of down_proj's input, a weight
of down_proj counts `|Wd[i,c]| nz_c` and one of gate_proj or up_proj `|W[c,j]| nz_c^alpha`, alpha =
0.5. Defined there for single weights, of the MLP only.

Choices: group-sum, `I_c = nz_c^alpha (||Wg[c,:]||_1 + ||Wu[c,:]||_1) + nz_c ||Wd[:,c]||_1`, where
each of the two parts is divided by its mean over the layer, since their scales differ. Heads go by
`wanda-sp`. nz is the root mean square over tokens; its constant goes with the mean.
"""

from __future__ import annotations

import numpy as np

from spp_export.calibration.statistics import LayerStatistics
from spp_export.common.arrays import FloatArray
from spp_export.importance import wanda_sp
from spp_export.importance.base import Convention, Criterion, Need
from spp_export.importance.units import column_sums, relative, row_sums

_ALPHA = 0.5


def channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [I]: 2 on average."""
    assert statistics.mlp is not None
    weights = statistics.weights
    norm = np.sqrt(statistics.mlp.square.astype(np.float64))
    read = norm**_ALPHA * (row_sums(weights.gate) + row_sums(weights.up))
    return relative(read) + relative(norm * column_sums(weights.down))


CRITERION = Criterion(
    name="dass",
    source="DaSS (TMLR 2025), alpha = 0.5; channels only",
    convention=Convention.GROUP_SUM,
    heads=wanda_sp.heads,
    channels=channels,
    needs=frozenset({Need.ACTIVATIONS}),
    companion=wanda_sp.CRITERION.name,
)
