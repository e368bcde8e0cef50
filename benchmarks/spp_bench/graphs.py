"""Work on a card, captured once and launched as a whole, so that nothing waits for Python."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def cuda_graph(work: Callable[[], Result]) -> Callable[[], Result]:
    """A call that repeats some work on the current device, on the same memory, and returns what
    the captured run returned. The work runs once before the capture, to load what it needs."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        work()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


def on_device(device: str | torch.device) -> AbstractContextManager[Any]:
    """Make this device, if it is a card, the one that streams and graphs are made on."""
    return torch.cuda.device(device) if torch.device(device).type == "cuda" else nullcontext()
