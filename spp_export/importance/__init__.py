"""Criteria: how much each unit matters for each domain. One short file each.

A criterion reads the statistics of one pass over the pools and gives scores [K,L,H], higher means
keep. It knows nothing of budgets, layers to protect or shapes: that is the plan's business.
Making scores of different layers comparable is `comparable`'s, for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from spp_export.importance import axis, energy
from spp_export.importance.comparable import COMPARABLE, comparable
from spp_export.importance.statistics import FloatArray, HeadStatistics

__all__ = ["COMPARABLE", "CRITERIA", "FloatArray", "HeadStatistics", "comparable"]

CRITERIA: Mapping[str, Callable[[HeadStatistics], FloatArray]] = {
    "energy": energy.score,
    "axis": axis.score,
}
