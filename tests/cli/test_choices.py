"""Requests type choices out again whose modules are slow to load: help comes before them."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from spp_export.common.options import DtypeName, field_types
from spp_export.importance.comparable import COMPARABLE
from spp_export.models.session import _DTYPES
from spp_export.models.shape import LAYOUTS, UNITS
from spp_export.planning.budget import COSTS
from spp_export.planning.plan import COMPENSATIONS
from spp_export.planning.request import Comparable, PlanRequest

TYPES = field_types(PlanRequest)


@pytest.mark.parametrize(
    ("choices", "known"),
    [
        (Comparable, COMPARABLE),
        (DtypeName, _DTYPES),
        (TYPES["units"], UNITS),
        (TYPES["layout"], LAYOUTS),
        (TYPES["compensate"], COMPENSATIONS),
        (TYPES["cost"], COSTS),
    ],
    ids=["comparable", "dtype", "units", "layout", "compensate", "cost"],
)
def test_the_choices_are_the_librarys(choices: Any, known: tuple[str, ...]) -> None:
    assert sorted(get_args(choices)) == sorted(known)
