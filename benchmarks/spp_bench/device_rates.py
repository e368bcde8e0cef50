"""The device's own bandwidth and rate, measured in this process with the threads of the models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from spp_bench.bounds import Rates
from spp_bench.clocks import clock_for

_REPEATS = 15
# Larger than any cache; and matrices large enough for the kernels that large models get.
_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
_WIDTH = {"cpu": 1536, "cuda": 8192}


def measure_rates(device: str, dtype: str) -> Rates:
    """The best of several reads and copies, and of several square matrix products in `dtype`."""
    import torch

    kind = "cuda" if device.startswith("cuda") else "cpu"
    clock = clock_for(device)
    count = _BYTES[kind] // 4
    # Pages that nobody wrote to may all be the same page of zeros.
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.ones_like(source)
    moved: dict[int, Callable[[], Any]] = {
        4 * count: source.sum,
        8 * count: partial(target.copy_, source),
    }
    bandwidth = max(
        size / min(clock(work) for _ in range(_REPEATS)) for size, work in moved.items()
    )
    moved.clear()
    del source, target
    width = _WIDTH[kind]
    square = torch.randn(width, width, device=device).to(getattr(torch, dtype))
    result = torch.empty_like(square)
    fastest = min(clock(lambda: torch.mm(square, square, out=result)) for _ in range(_REPEATS))
    return Rates(bandwidth, 2 * width**3 / fastest)
