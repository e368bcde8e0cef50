"""Seconds of a piece of work, by the processor's clock or by the card's events."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Runs some work and tells how many seconds it took.
Clock = Callable[[Callable[[], Any]], float]
# Bytes; more than those of any card.
_CACHES = 1 << 28


def wall_clock(work: Callable[[], Any], /) -> float:
    """The wall clock, for work that is done when its call returns."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def clock_for(device: str) -> Clock:
    """CUDA events around work that PyTorch queues on a card, the wall clock elsewhere."""
    return _cuda_clock(device) if device.startswith("cuda") else wall_clock


def cold_clock_for(device: str) -> Clock:
    """As `clock_for`, for work of microseconds. On a card it is launched during a read of more
    than the caches hold, so that none of its tensors are cached when it starts."""
    if not device.startswith("cuda"):
        return wall_clock
    import torch

    return _cuda_clock(device, torch.zeros(_CACHES // 4, device=device).sum)


def _cuda_clock(device: str, before: Callable[[], Any] = lambda: None) -> Clock:
    import torch

    def timed(work: Callable[[], Any]) -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            before()
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            return float(start.elapsed_time(end)) / 1e3

    return timed


@contextmanager
def no_collection() -> Iterator[None]:
    """Turn off Python's garbage collector, whose pauses would be counted against whatever runs."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
