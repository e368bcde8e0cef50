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
    kept = chosen(rows, covered)
    return [
        pytest.param(
            *(row if isinstance(row, tuple) else (row,)),
            marks=() if index in kept else pytest.mark.slow,
        )
        for index, row in enumerate(rows)
    ]


def chosen(
    rows: Sequence[Any], covered: Callable[[Any], Iterable[Hashable]], most: int | None = None
) -> set[int]:
    """Indices of rows, at most so many, that cover together all that the rows cover, or as much as
    they can."""
    covers = [set(covered(row)) for row in rows]
    left, kept, times = set().union(*covers), set[int](), Counter[Hashable]()
    while left and (most is None or len(kept) < most):
        # Of rows that are as good, one with what came seldom.
        best = max(
            range(len(rows)),
            key=lambda index: (len(covers[index] & left), -sum(times[it] for it in covers[index])),
        )
        left -= covers[best]
        times.update(covers[best])
        kept.add(best)
    return kept


def each(row: Sequence[Any]) -> set[Hashable]:
    """Of a row of a case of `factories` and other values: the case's family, and every value."""
    case, *others = row
    return {case.family, *others}


def of_family(row: Sequence[Any]) -> set[Hashable]:
    """Of a row of a case of `factories` and other values: the case, every pair of its family and
    one of the others, and every pair of these."""
    case, *others = row
    return {case.name} | pairs((case.family, *others))
