"""What a criterion is: two functions of one layer's statistics, and where they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from spp_export.calibration.statistics import FloatArray, LayerStatistics


class Need(StrEnum):
    """What has to be gathered before a criterion can be asked; weights are always at hand."""

    ACTIVATIONS = "activations"
    GRADIENTS = "gradients"
    AXIS = "axis"


class Convention(StrEnum):
    """Which of the coupled matrices a score reads."""

    OUTPUT_ONLY = "output-only"
    GROUP_SUM = "group-sum"
    NONE = "none"


@dataclass(frozen=True)
class Criterion:
    """Scores of the units of one layer, higher means keep: heads [H] and channels [I].

    source: the paper and the variant. comparable: how its scores are best put beside other
    layers', one of `COMPARABLE`. companion: the criterion whose scores its heads (or channels)
    are, for a method that is defined for one kind of unit only.
    """

    name: str
    source: str
    convention: Convention
    heads: Callable[[LayerStatistics], FloatArray]
    channels: Callable[[LayerStatistics], FloatArray]
    needs: frozenset[Need] = frozenset()
    comparable: str = "standardised"
    companion: str | None = None
