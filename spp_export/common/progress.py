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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' notes and progress bars; errors still show. Its settings come back."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
