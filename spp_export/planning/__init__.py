"""Scores, budget and layout to a plan; plans as files; plans against models. No torch."""

from __future__ import annotations

from spp_export.models.shape import LAYOUTS, Layout
from spp_export.planning.budget import DEFAULT_KEEP, Budget
from spp_export.planning.compile import (
    Realised,
    compile_options,
    compile_plan,
    compile_units,
    cover,
    exactly,
    forced_heads,
)
from spp_export.planning.plan import COMPENSATIONS, FILL, Compensation, LayerPlan, Plan, dense_plan
from spp_export.planning.plan_file import (
    check_plan_target,
    parse_plan,
    read_plan,
    validate_plan,
    write_plan,
)

__all__ = [
    "COMPENSATIONS",
    "DEFAULT_KEEP",
    "FILL",
    "LAYOUTS",
    "Budget",
    "Compensation",
    "LayerPlan",
    "Layout",
    "Plan",
    "Realised",
    "check_plan_target",
    "compile_options",
    "compile_plan",
    "compile_units",
    "cover",
    "dense_plan",
    "exactly",
    "forced_heads",
    "parse_plan",
    "read_plan",
    "validate_plan",
    "write_plan",
]
