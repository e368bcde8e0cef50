"""Marks and colours. Named colours only, which a light and a dark terminal both show well."""

from __future__ import annotations

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
