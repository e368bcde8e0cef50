"""What hostile input may cost before it is refused: counted, never timed."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from spp_export.common.errors import SppError

_LONGEST_MESSAGE = 1500


@dataclass
class Calls:
    """Calls of functions, those written in C among them."""

    count: int = 0


@contextmanager
def counted_calls() -> Iterator[Calls]:
    """Count the calls that this thread makes."""
    calls = Calls()

    def profile(frame: object, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            calls.count += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(before)


@contextmanager
def refused(
    error: type[SppError] = SppError,
    match: str | None = None,
    *,
    megabytes: float = 64,
    calls: int = 5_000_000,
) -> Iterator[pytest.ExceptionInfo[SppError]]:
    """The error in one line, after few calls and in little memory."""
    tracemalloc.start()
    try:
        with counted_calls() as made, pytest.raises(error, match=match) as caught:
            yield caught
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made.count < calls
    assert peak < megabytes * (1 << 20), f"{peak >> 20} MiB"
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < _LONGEST_MESSAGE
