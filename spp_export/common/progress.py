"""How long work reports on itself: `with progress("slicing", total) as advance_to`.

The library reports, the caller draws: nothing by default, rich's bars in the CLI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

# (what is being done, total or None where it is unknown) -> context giving advance_to(done so far)
Listener = Callable[[str, float | None], AbstractContextManager[Callable[[float], None]]]


@contextmanager
def _silent(description: str, total: float | None) -> Iterator[Callable[[float], None]]:
    yield lambda done: None


_LISTENER: ContextVar[Listener] = ContextVar("listener", default=_silent)


def report_to(listener: Listener | None) -> None:
    """Report the stages of all work from here on to `listener`; to nobody with None."""
    _LISTENER.set(listener or _silent)


def progress(
    description: str, total: float | None
) -> AbstractContextManager[Callable[[float], None]]:
    """A stage of `total` units of work; the context gives `advance_to(done so far)`."""
    return _LISTENER.get()(description, total)


@contextmanager
def show_progress(listener: Listener) -> Iterator[None]:
    """Report the stages of all work inside to `listener`."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


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
