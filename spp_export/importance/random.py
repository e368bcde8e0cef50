"""`random`: seeded uniform scores, the control that a criterion must beat.

Independent draws for every layer and kind of unit, the same for every text. One seed says little:
report the mean of three or more.
"""

from __future__ import annotations

import numpy as np

from spp_export.calibration.statistics import LayerStatistics
from spp_export.common.arrays import FloatArray
from spp_export.importance.base import Convention, Criterion


def heads(statistics: LayerStatistics) -> FloatArray:
    """Scores [H] in [0,1)."""
    return np.random.default_rng([statistics.seed, statistics.layer, 0]).random(statistics.heads)


def channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [I] in [0,1)."""
    count: int = statistics.weights.down.shape[1]
    return np.random.default_rng([statistics.seed, statistics.layer, 1]).random(count)


def experts(statistics: LayerStatistics) -> FloatArray:
    """Scores [E] in [0,1)."""
    seed = [statistics.seed, statistics.layer, 2]
    return np.random.default_rng(seed).random(statistics.expert_count)


def expert_channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [E,F] in [0,1)."""
    assert statistics.expert_columns is not None
    seed = [statistics.seed, statistics.layer, 3]
    return np.random.default_rng(seed).random(statistics.expert_columns.squares.shape)


CRITERION = Criterion(
    name="random",
    source="uniform draws",
    convention=Convention.NONE,
    heads=heads,
    channels=channels,
    comparable="shifted",
    experts=experts,
    expert_channels=expert_channels,
)
