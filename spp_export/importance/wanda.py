"""`wanda`: Wanda's scores summed over every matrix a unit takes part in.

Wanda (arXiv 2306.11695): `S[i,j] = |W[i,j]| n_j` with n_j the norm of input j; defined there for
single weights. Group-sum to units: a head adds its rows of q_proj, its share of its KV head's rows
of k_proj and v_proj and its columns of o_proj; a channel its rows of gate_proj and up_proj and its
column of down_proj.

Choices: each matrix's scores are divided by their own mean before they are added, otherwise the
widest decides; the g query heads of a KV head count 1/g of it each. n_j is the root mean square
over tokens; its constant goes with the mean.
"""

from __future__ import annotations

import numpy as np

from spp_export.calibration.statistics import LayerStatistics
from spp_export.common.arrays import FloatArray
from spp_export.importance.base import Convention, Criterion, Need
from spp_export.importance.units import column_sums, per_head, per_query_head, relative


def heads(statistics: LayerStatistics) -> FloatArray:
    """Scores [H]: 1 for each of q_proj and o_proj and 1/g for k_proj and v_proj, on average."""
    assert statistics.attention is not None
    weights, inputs = statistics.weights, statistics.attention
    count = statistics.heads
    norm = np.sqrt(inputs.input_square.astype(np.float64))
    score = relative(per_head(np.abs(weights.query) @ norm, count))
    for matrix in (weights.key, weights.value):
        score += per_query_head(relative(per_head(np.abs(matrix) @ norm, statistics.groups)), count)
    written = column_sums(weights.output) * np.sqrt(inputs.square)
    return score + relative(per_head(written, count))


def channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [I]: 1 for each of the three matrices, on average."""
    assert statistics.mlp is not None
    weights, inputs = statistics.weights, statistics.mlp
    norm = np.sqrt(inputs.input_square.astype(np.float64))
    score = relative(column_sums(weights.down) * np.sqrt(inputs.square))
    for matrix in (weights.gate, weights.up):
        score += relative(np.abs(matrix) @ norm)
    return score


CRITERION = Criterion(
    name="wanda",
    source="Wanda (arXiv 2306.11695), summed over the coupled matrices",
    convention=Convention.GROUP_SUM,
    heads=heads,
    channels=channels,
    needs=frozenset({Need.ACTIVATIONS}),
)
