"""`energy`: the root mean square of what a head writes into the residual stream.

`I(l,h,k) = sqrt(E_{x~P_k} ||w_{l,h}(x)||^2)`, on the true forward pass. Output-only: it reads
o_proj and its input, nothing else. No gradient.
"""

from __future__ import annotations

import numpy as np

from spp_export.importance.statistics import FloatArray, HeadStatistics


def score(statistics: HeadStatistics) -> FloatArray:
    """Scores [K,L,H] in units of the residual stream's norm."""
    return np.sqrt(statistics.write_energy)
