"""The CLI types the library's choices out again: help must come before their module is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest

from spp_cli import options
from spp_export.importance import COMPARABLE
from spp_export.models.shape import UNITS
from spp_export.planning import COMPENSATIONS, LAYOUTS
from spp_export.planning.budget import COSTS
from spp_export.planning.request import POLICIES


def words(alias: Any) -> Iterator[str]:
    """The words of the Literal inside an option's type."""
    for part in get_args(get_args(alias)[0]):
        yield from (part,) if isinstance(part, str) else get_args(part)


@pytest.mark.parametrize(
    ("option", "known"),
    [
        (options.Units, UNITS),
        (options.Comparable, tuple(COMPARABLE)),
        (options.Layout, LAYOUTS),
        (options.Policy, POLICIES),
        (options.Compensate, COMPENSATIONS),
        (options.Cost, COSTS),
    ],
    ids=["units", "comparable", "layout", "policy", "compensate", "cost"],
)
def test_the_choices_are_the_librarys(option: Any, known: tuple[str, ...]) -> None:
    assert sorted(words(option)) == sorted(known)
