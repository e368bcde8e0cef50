"""How things look: marks, colours, and numbers as people read them.

Named colours only, which a light and a dark terminal both show well.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass

KEPT = "cyan"
GOOD = "green"
BAD = "bold red"
FAINT = "dim"
STRONG = "bold"

WIDTH = 100


@dataclass(frozen=True)
class Look:
    """Characters to draw with, and the width to draw in."""

    block: str = "█"
    dot: str = "·"
    bar: str = "━"
    line: str = "─"
    arrow: str = "→"
    width: int = WIDTH


UNICODE = Look()
ASCII = Look(block="#", dot=".", bar="=", line="-", arrow="->")


def byte_size(count: float) -> str:
    """Bytes in decimal units: 538.1 MB."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def seconds(value: float) -> str:
    """A duration: 0.4 s, 12 s, 3 min 20 s."""
    if value < 9.95:
        return f"{value:.1f} s"
    if value < 99.5:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers with runs joined: 0, 3-7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def single_line(text: object) -> str:
    """Untrusted text for one line of a terminal: no line breaks, no control characters."""
    flat = " ".join(str(text).split())
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in flat)


def peak_memory() -> int:
    """Bytes of memory that this process has held at most (resident set)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
