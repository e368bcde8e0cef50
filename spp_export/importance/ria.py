"""`ria`: relative importance and activations, summed over a unit's columns.

RIA (Plug-and-Play, ICLR 2024): a weight's share of its column plus its share of its row, times the
norm of its input to the power a = 0.5,
`(|W[i,c]| / sum_i' |W[i',c]| + |W[i,c]| / sum_c' |W[i,c']|) n_c^a`. Defined there for single
weights.

Choice: output-only, the sum over the columns of o_proj and down_proj. All shares of one column add
up to one, so `I_c = n_c^a (1 + sum_i |W[i,c]| / ||W[i,:]||_1)`: what is left of the first term is
that one (zero for a column of zeros). A head's score is the sum over its dh columns. n_c is the
root mean square over tokens.
"""

from __future__ import annotations

import numpy as np

from spp_export.calibration.statistics import LayerStatistics
from spp_export.common.arrays import FloatArray
from spp_export.importance.base import Convention, Criterion, Need
from spp_export.importance.units import column_sums, per_head, row_sums

_POWER = 0.5


def heads(statistics: LayerStatistics) -> FloatArray:
    """Scores [H]."""
    assert statistics.attention is not None
    columns = _columns(statistics.weights.output, statistics.attention.square)
    return per_head(columns, statistics.heads)


def channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [I]."""
    assert statistics.mlp is not None
    return _columns(statistics.weights.down, statistics.mlp.square)


def _columns(matrix: FloatArray, square: FloatArray) -> FloatArray:
    rows = row_sums(matrix)
    # A row of zeros adds nothing, whatever it is divided by.
    of_rows = (1.0 / np.where(rows > 0, rows, 1.0)) @ np.abs(matrix)
    of_columns = column_sums(matrix) > 0
    scores: FloatArray = square.astype(np.float64) ** (_POWER / 2) * (of_columns + of_rows)
    return scores


CRITERION = Criterion(
    name="ria",
    source="RIA (Plug-and-Play, ICLR 2024), output-only column sum, a = 0.5",
    convention=Convention.OUTPUT_ONLY,
    heads=heads,
    channels=channels,
    needs=frozenset({Need.ACTIVATIONS}),
)
