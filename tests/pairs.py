"""A few of many combinations: what `make test` tries of what `make test-all` tries in full."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import pytest


def pairs(row: Sequence[Any]) -> set[Hashable]:
    """Every two values of a row, with their places."""
    return set(itertools.combinations(enumerate(row), 2))


def few(rows: Iterable[Any], covered: Callable[[Any], Iterable[Hashable]] = pairs) -> list[Any]:
    """Parameters of a test, slow but for a few that cover together all that the rows cover.

    covered  what a row covers: every pair of its values, if nothing else is said
    """
    rows = list(rows)
    covers = [set(covered(row)) for row in rows]
    left, chosen, times = set().union(*covers), set(), Counter()
    while left:
        # Of rows that are as good, one with what came seldom.
        best = max(
            range(len(rows)),
            key=lambda index: (len(covers[index] & left), -sum(times[it] for it in covers[index])),
        )
        left -= covers[best]
        times.update(covers[best])
        chosen.add(best)
    return [
        pytest.param(
            *(row if isinstance(row, tuple) else (row,)),
            marks=() if index in chosen else pytest.mark.slow,
        )
        for index, row in enumerate(rows)
    ]


def each(row: Sequence[Any]) -> set[Hashable]:
    """Of a row of a case of `factories` and other values: the case's family, and every value."""
    case, *others = row
    return {case.family, *others}


def of_family(row: Sequence[Any]) -> set[Hashable]:
    """Of a row of a case of `factories` and other values: the case, every pair of its family and
    one of the others, and every pair of these."""
    case, *others = row
    return {case.name} | pairs((case.family, *others))
