"""How long work reports on itself: a context manager that yields a function `advance_to(done)`.

The library reports, the caller draws: `no_progress` draws nothing, the CLI passes rich's bars.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# (what is being done, total or None where it is unknown) -> context giving advance_to(done so far)
Progress = Callable[[str, float | None], AbstractContextManager[Callable[[float], None]]]


@contextmanager
def no_progress(description: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """Report nothing."""
    yield lambda done: None
