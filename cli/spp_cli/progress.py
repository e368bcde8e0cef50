"""Bars on a terminal for the library's progress protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column


class Bars:
    """One bar per stage; a stage that begins inside another gets its line below.

    The console keeps the stream it was made with: libraries exchange sys.stderr for a moment.
    """

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False)
        self._open: list[Progress] = []

    @contextmanager
    def __call__(self, description: str, total: float | None) -> Iterator[Callable[[float], None]]:
        """Show a stage from its beginning to its end."""
        bars = self._open[-1] if self._open else self._new()
        self._open.append(bars)
        task = bars.add_task(description, total=total)
        try:
            yield lambda done: bars.update(task, completed=done)
            end = total or 1.0
            bars.update(task, total=end, completed=end)
        finally:
            self._open.pop()
            if not self._open:
                bars.stop()

    def _new(self) -> Progress:
        bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(min_width=40)),
            BarColumn(bar_width=24, complete_style="cyan", finished_style="cyan"),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            redirect_stdout=False,
        )
        bars.start()
        return bars
