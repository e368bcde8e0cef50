"""`axis`: the share of a head's write that lies along the domain's probe axis.

SubspacePath Pruner (ICML 2026), Eq. 5: `I(l,h,k) = E (u_k . w)^2 / (||w||^2 + eps)`. Output-only.
A share is blind to how much a head writes; as a reason to remove heads it does worse than chance on
the default model, so it is here for comparison and never the default.
"""

from __future__ import annotations

from spp_export.importance.statistics import FloatArray, HeadStatistics


def score(statistics: HeadStatistics) -> FloatArray:
    """Scores [K,L,H], each in [0,1]."""
    return statistics.axis_share
