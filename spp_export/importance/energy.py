"""`energy`: the root mean square of what a unit writes into the residual stream.

`I = sqrt(E ||w(x)||^2)` on the true forward pass. A head writes `w = Wo_h a_h`, so that
`E ||w||^2 = tr(Wo_h^T Wo_h C_h)` with `C_h = E a_h a_h^T`; a channel has `||Wd_c||^2 E z_c^2`.
Output-only: it reads o_proj and down_proj and their inputs. No gradient. An expert writes its
output times its weight by the router, and nothing for tokens that are not routed to it; what is
left out is that these are routed to others once it is gone. So does a channel of an expert, of
which every token is still routed to the same.

Across layers it goes by `stream`: squared, and relative to the stream that is written to, which is
the energy that goes with the unit, in one currency for layers, heads and channels.
"""

from __future__ import annotations

import numpy as np

from spp_export.calibration.statistics import LayerStatistics
from spp_export.common.arrays import FloatArray
from spp_export.importance.base import Convention, Criterion, Need
from spp_export.importance.units import column_squares


def heads(statistics: LayerStatistics) -> FloatArray:
    """Scores [H] in units of the residual stream's norm."""
    assert statistics.attention is not None
    second = statistics.attention.second
    blocks = np.split(statistics.weights.output, statistics.heads, axis=1)
    energies = [_energy(block, moments) for block, moments in zip(blocks, second, strict=True)]
    return np.sqrt(energies)


def _energy(block: FloatArray, moments: FloatArray) -> float:
    wide = block.astype(np.float64)
    # Moments of an input that is nearly zero may be negative by rounding.
    return max(float(np.vdot(wide.T @ wide, moments)), 0.0)


def channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [I] in units of the residual stream's norm."""
    assert statistics.mlp is not None
    return np.sqrt(column_squares(statistics.weights.down) * statistics.mlp.square)


def expert_channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [E,F] in units of the residual stream's norm: of `g z_c w_c`."""
    assert statistics.expert_inputs is not None
    assert statistics.expert_columns is not None
    squares = statistics.expert_columns.squares.astype(np.float64)
    return np.sqrt(squares * statistics.expert_inputs.square)


def experts(statistics: LayerStatistics) -> FloatArray:
    """Scores [E] in units of the residual stream's norm."""
    assert statistics.experts is not None
    return np.sqrt(statistics.experts.square.astype(np.float64))


CRITERION = Criterion(
    name="energy",
    source="root mean square of the write into the residual stream",
    convention=Convention.OUTPUT_ONLY,
    heads=heads,
    channels=channels,
    needs=frozenset({Need.ACTIVATIONS}),
    comparable="stream",
    experts=experts,
    expert_channels=expert_channels,
)
