"""Signals that would raise in the middle of taking or giving back something wait until it is done.

Python runs a signal's handler between any two bytecodes of the main thread, and what the handler
raises can split `take()` from the `try` that gives back. Inside `held()` handlers only take a note;
the first of them is run where `held()` ends.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class held:  # noqa: N801  it is used like a function, as contextlib's classes are
    """A context in which no signal raises. May be nested; outside the main thread, where no
    handler ever runs, it does nothing.

    A class and not a generator: nothing is left to do between its last bytecode and the body.
    """

    depth = 0
    waiting: list[int] = []  # noqa: RUF012  one for the process

    def __enter__(self) -> None:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            _wait_in_line()
            held.depth += 1

    def __exit__(self, *_: object) -> None:
        if not self._main:
            return
        held.depth -= 1
        if not held.depth and held.waiting:
            number, held.waiting = held.waiting[0], []
            handler = signal.getsignal(number)
            if callable(handler):
                handler(number, None)


class _Waiting:
    """A handler that waits while signals are held, and does what `handler` does otherwise."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if held.depth:
            held.waiting.append(number)
        else:
            held.waiting.clear()  # all of them are told by this
            self.handler(number, frame)


def _wait_in_line() -> None:
    """Let every handler of the process wait; what is ignored, or ends the process without Python,
    stays as it is."""
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler) and not isinstance(handler, _Waiting):
            signal.signal(number, _Waiting(handler))


class Cleanup:
    """An action that gives something back: when `run` is called, else when this object goes, else
    when the process ends, and however often a signal comes in between.

    Make it before what it gives back exists; the action must bear that it does not. Where it
    returns False, it is tried again when the process ends. A forked child leaves it to its parent.
    """

    _numbers = itertools.count()
    _number = -1  # until it is made
    _pending: dict[int, tuple[int, Callable[[], bool | None]]] = {}  # noqa: RUF012  the process's own

    def __init__(self, action: Callable[[], bool | None]) -> None:
        self._number = next(Cleanup._numbers)
        Cleanup._pending[self._number] = os.getpid(), action

    def run(self) -> None:
        """Give it back, unless that was done before."""
        Cleanup._run(self._number)

    def cancel(self) -> None:
        """Do nothing any more: it was given back otherwise."""
        Cleanup._pending.pop(self._number, None)

    def __del__(self) -> None:
        self.run()

    @staticmethod
    def _run(number: int) -> None:
        with held():
            process, action = Cleanup._pending.get(number, (None, None))
            if action and process == os.getpid() and action() is False:
                return
            Cleanup._pending.pop(number, None)

    @staticmethod
    def _run_all() -> None:
        for number in sorted(Cleanup._pending, reverse=True):
            Cleanup._run(number)


atexit.register(Cleanup._run_all)
