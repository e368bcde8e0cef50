"""Axes: where a value lies, and which values get a tick."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
# Of a power of ten, the most welcome ones first.
_LOG_STEPS = (1.0, 2.0, 4.0, 1.5, 3.0, 6.0, 1.2, 8.0, 1.1)
# Beyond this factor between its ends, an axis of ratios is logarithmic.
_LOG_ABOVE = 2.0


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value, as far as one beyond the ends."""
        bend: Callable[[float], float] = math.log if self.log else float
        low, high = bend(self.low), bend(self.high)
        share = (bend(max(value, self.low / 10) if self.log else value) - low) / (high - low)
        return self.start + min(max(share, -1.0), 2.0) * (self.end - self.start)


def value_scale(
    values: Sequence[float], start: float, end: float, *, zero: bool, ratio: bool, most: int = 6
) -> Scale:
    """A scale around values with round ends; from zero on, or of ratios, perhaps logarithmic."""
    low, high = (0.0 if zero else min(values)), max(values)
    if ratio and low > 0 and high / low > _LOG_ABOVE:
        low, high = low * 0.97, high * 1.03
        return Scale(low, high, start, end, _log_ticks(low, high, most), log=True)
    if high - low < 1e-9 * max(abs(high), 1e-9):
        low, high = low - 0.05 * (abs(low) or 1), high + 0.05 * (abs(high) or 1)
    step = _step((high - low) / (most - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(index * step, 12) for index in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], start, end, ticks)


def place_scale(values: Sequence[float], start: float, end: float, *, log: bool) -> Scale:
    """A scale whose ticks are the measured places themselves, with room at both ends."""
    places = tuple(sorted(set(values)))
    low, high = places[0], places[-1]
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 1, high + 1)
    return Scale(low, high, start, end, places, log=log)


def _step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in _STEPS if step * power >= least * (1 - 1e-9))


def _log_ticks(low: float, high: float, most: int) -> tuple[float, ...]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    apart = math.log(high / low) / (1.5 * most)
    chosen: list[float] = []
    for step in (round(step * 10.0**power, 12) for step in _LOG_STEPS for power in powers):
        alone = all(abs(math.log(step / other)) >= apart for other in chosen)
        if low <= step <= high and alone:
            chosen.append(step)
    return tuple(sorted(chosen))
