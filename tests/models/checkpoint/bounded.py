"""What hostile files may cost before they are refused."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from spp_export.common.errors import SppError

_LONGEST = 1500


@contextmanager
def refused(
    error: type[SppError] = SppError,
    match: str | None = None,
    *,
    megabytes: float = 64,
    seconds: float = 20.0,
) -> Iterator[pytest.ExceptionInfo[SppError]]:
    """The error in one line, soon, and in little memory."""
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(error, match=match) as caught:
            yield caught
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < seconds
    assert peak < megabytes * (1 << 20), f"{peak >> 20} MiB"
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < _LONGEST
