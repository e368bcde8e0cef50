"""Lines where there is no terminal for the library's progress protocol. Imports nothing heavy."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

EVERY_S = 10.0


def seconds_between() -> float:
    """Of $SPP_PROGRESS_SECONDS, 0 for no lines; ten by default, and for what is no number."""
    try:
        return max(float(os.environ.get("SPP_PROGRESS_SECONDS", EVERY_S)), 0.0)
    except ValueError:
        return EVERY_S


@dataclass
class _Stage:
    """What is being done: how much of it, and since when."""

    description: str
    total: float | None
    began: float
    done: float = 0.0


class Lines:
    """A line every few seconds on the stage that goes on, innermost first.

    Work that ends sooner says nothing, and no line is ever written over.
    """

    def __init__(self, stream: TextIO, seconds: float = EVERY_S) -> None:
        self._stream, self._seconds = stream, seconds
        self._open: list[_Stage] = []
        self._ended = threading.Event()

    @contextmanager
    def __call__(self, description: str, total: float | None) -> Iterator[Callable[[float], None]]:
        """Report on a stage from its beginning to its end."""
        stage = _Stage(description, total, time.monotonic())
        outermost = not self._open
        self._open.append(stage)
        if outermost:
            self._ended = threading.Event()
            writer = threading.Thread(target=self._write, args=(self._ended,), daemon=True)
            writer.start()

        def advance_to(done: float) -> None:
            stage.done = done

        try:
            yield advance_to
        finally:
            self._open.remove(stage)
            if outermost:
                self._ended.set()
                writer.join()

    def _write(self, ended: threading.Event) -> None:
        while not ended.wait(self._seconds):
            if stages := self._open[-1:]:
                print(_line(stages[0], time.monotonic()), file=self._stream, flush=True)


def _line(stage: _Stage, now: float) -> str:
    """What is done, how much of it, and about how long it will take."""
    spent = now - stage.began
    if not stage.total or not stage.done:
        return f"{stage.description}: {_duration(spent)}"
    share = min(stage.done / stage.total, 1.0)
    left = spent * (1 - share) / share
    return f"{stage.description}: {share:.0%}, {_duration(spent)}, about {_duration(left)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
