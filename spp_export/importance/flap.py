"""`flap`: how much a unit's input fluctuates, times the size of the weights that read it.

FLAP (AAAI 2024, arXiv 2312.11983), metric WIFV: `m_c = Var(x_c) ||W[:,c]||^2` on o_proj and
down_proj. What does not fluctuate can go into a bias, which is why FLAP comes with one. Across
layers (structure AL-AM) channels are standardised inside the layer with the unbiased deviation, and
a head's score is the mean over its dh channels; o_proj's metric is squared once more before that.
Output-only.

Choices: the variance is that of single tokens, `E x^2 - (E x)^2`, which is what the released code
comes to (the paper has that of the means of sequences); the extra square is the released code's.
Scores arrive standardised, so `shifted` leaves them as they are but for the lowest.
"""

from __future__ import annotations

import numpy as np

from spp_export.calibration.statistics import LayerStatistics
from spp_export.common.arrays import FloatArray
from spp_export.importance.base import Convention, Criterion, Need
from spp_export.importance.units import column_squares, per_head


def heads(statistics: LayerStatistics) -> FloatArray:
    """Scores [H] in deviations of the layer's channels."""
    assert statistics.attention is not None
    inputs = statistics.attention
    metric = _variance(inputs.square, inputs.mean) * column_squares(statistics.weights.output)
    dim = len(metric) // statistics.heads
    return per_head(_standardised(metric**2), statistics.heads) / dim


def channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [I] in deviations of the layer's channels."""
    assert statistics.mlp is not None
    inputs = statistics.mlp
    metric = _variance(inputs.square, inputs.mean) * column_squares(statistics.weights.down)
    return _standardised(metric)


def _variance(square: FloatArray, mean: FloatArray) -> FloatArray:
    # The difference of two nearly equal numbers may be negative by rounding.
    variance: FloatArray = np.maximum(square - np.square(mean, dtype=np.float64), 0.0)
    return variance


def _standardised(metric: FloatArray) -> FloatArray:
    deviation = metric.std(ddof=1)
    scores: FloatArray = (metric - metric.mean()) / (deviation if deviation > 0 else 1.0)
    return scores


CRITERION = Criterion(
    name="flap",
    source="FLAP (AAAI 2024), WIFV with AL-AM's standardisation",
    convention=Convention.OUTPUT_ONLY,
    heads=heads,
    channels=channels,
    needs=frozenset({Need.ACTIVATIONS}),
    comparable="shifted",
)
