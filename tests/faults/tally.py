"""Counts what became of every case, and stops at the first broken promise."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from workbench import BrokenPromiseError
from zygote import Ended

STATES = ("none", "older", "new")


class Tally:
    """How many cases of each fault there were, and what each left at its target."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.skipped: dict[str, str] = {}
        self._began = time.monotonic()

    @contextmanager
    def case(self, fault: str, **facts: object) -> Iterator[list[str]]:
        """One case; the body appends the state that it found. `facts` are shown if it fails."""
        found: list[str] = []
        try:
            yield found
        except BrokenPromiseError as error:
            print(f"\nBROKEN: {fault}: {error}\n  {facts}", file=sys.stderr)
            raise
        self.counts.setdefault(fault, Counter()).update(found)

    def skip(self, fault: str, reason: str) -> None:
        """A fault that cannot be caused on this machine."""
        self.skipped[fault] = reason

    def show(self) -> None:
        """The table of everything that was tried."""
        print(f"{'fault':44} {'cases':>5} {'no output':>9} {'as it was':>9} {'new, whole':>10}")
        total: Counter[str] = Counter()
        for fault, counts in self.counts.items():
            self._row(fault, counts)
            total += counts
        self._row("all", total)
        for fault, reason in self.skipped.items():
            print(f"NOT TRIED: {fault}: {reason}")
        print(f"{time.monotonic() - self._began:.0f} s, every promise held")

    def _row(self, fault: str, counts: Counter[str]) -> None:
        none, older, new = (counts[state] for state in STATES)
        print(f"{fault:44} {counts.total():5} {none:9} {older:9} {new:10}")


def one_line(ended: Ended, status: int | set[int], text: str = "") -> None:
    """Raise BrokenPromiseError unless it ended so, with one line on stderr that holds `text`."""
    lines = ended.err.splitlines()
    expected = {status} if isinstance(status, int) else status
    good = ended.status in expected and len(lines) == 1 and lines[0].startswith("error: ")
    if not good or text not in lines[0] or "internal error" in lines[0]:
        raise BrokenPromiseError(
            f"expected status {status} and one line with {text!r}, got {ended.status} and\n"
            f"{ended.err[-2000:]}"
        )


def succeeded(ended: Ended) -> None:
    """Raise BrokenPromiseError unless all went well without a word."""
    if ended.status != 0 or ended.err:
        raise BrokenPromiseError(f"expected success, got {ended.status} and\n{ended.err[-2000:]}")
