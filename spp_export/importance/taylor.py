"""`taylor`: how much the loss of a text would change, to first order, if a unit were gated off.

Michel, Levy and Neubig (NeurIPS 2019, arXiv 1905.10650), Eq. 2: `I = E_x |a_u . dLoss_x/da_u|`, the
gradient with respect to a gate of one on the unit's output; the absolute value is taken per text.
The same gate on a channel of down_proj's input is the criterion of Molchanov et al. (ICLR 2017,
arXiv 1611.06440). No weight is read: the gradient already holds what comes after the unit.

Michel et al. divide by the layer's L2 norm before they compare layers; here that is left to
`comparable`, and `standardised` is what did best.
"""

from __future__ import annotations

import numpy as np

from spp_export.calibration.statistics import LayerStatistics
from spp_export.common.arrays import FloatArray
from spp_export.importance.base import Convention, Criterion, Need


def heads(statistics: LayerStatistics) -> FloatArray:
    """Scores [H] in units of the loss."""
    assert statistics.gradients is not None
    return statistics.gradients.head_gates.astype(np.float64)


def channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [I] in units of the loss."""
    assert statistics.gradients is not None
    return statistics.gradients.channel_gates.astype(np.float64)


CRITERION = Criterion(
    name="taylor",
    source="Michel et al. (NeurIPS 2019), gates of heads and channels",
    convention=Convention.NONE,
    heads=heads,
    channels=channels,
    needs=frozenset({Need.GRADIENTS}),
)
