"""What a list of times is reported as."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def quantiles(times: Sequence[float], unit: str) -> dict[str, float]:
    """Median, 20th and 80th percentile of `times`, which are in `unit`."""
    low, median, high = np.quantile(times, [0.2, 0.5, 0.8])
    named = {"median": median, "p20": low, "p80": high}
    return {f"{name}_{unit}": round(float(value), 3) for name, value in named.items()}
