"""Numbers as the page writes them."""

from __future__ import annotations

import math

# As typography has them; their look-alikes on a keyboard are what linters expect in code.
TIMES, MINUS, DASH = "\u00d7", "\u2212", "\u2013"
# Keeps a number and its unit on one line.
_SPACE = "\u00a0"
_UNITS = ("B", "kB", "MB", "GB", "TB")


def integer(value: float) -> str:
    """A whole number: 134,515,008."""
    return f"{value:,.0f}"


def byte_size(value: float) -> str:
    """Bytes in decimal units: 538.1 MB."""
    for unit in _UNITS:
        if value < 999.95 or unit == _UNITS[-1]:
            break
        value /= 1000
    return f"{value:,.{0 if unit == 'B' else 1}f}{_SPACE}{unit}"


def percent(value: float) -> str:
    """A share: 94 %, 4.1 %, 0.2 %."""
    shown = 100 * value
    digits = 0 if shown >= 9.95 or shown == 0 else 1
    number = f"{shown:.{digits}f}" if shown >= 0.05 or shown == 0 else f"<{_SPACE}0.1"
    return f"{number}{_SPACE}%"


def change(dense: float, slim: float) -> str:
    """The signed change of a size, in percent."""
    if not dense:
        return ""
    share = 100 * (slim / dense - 1)
    if abs(share) < 0.05:
        return f"±0{_SPACE}%"
    return f"{MINUS if share < 0 else '+'}{abs(share):.1f}{_SPACE}%"


def figure(value: float, digits: int = 3) -> str:
    """A measured figure in some significant digits: 1.03, 0.000406, 6.9e-05, 12,300."""
    if not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("-", MINUS)
    places = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{places}f}"


def times(value: float, digits: int = 3) -> str:
    """A ratio, with the sign of multiplication behind it."""
    return f"{figure(value, digits)}{TIMES}"


def nth(number: int) -> str:
    """1st, 2nd, 3rd, 4th."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ending}"


def ranges(numbers: tuple[int, ...]) -> str:
    """Ascending numbers with runs joined: 0, 3 to 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}{DASH}{b}" for a, b in runs)
