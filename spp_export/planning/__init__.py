"""Scores, budget and layout to a plan; plans as files; plans against models. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spp_export.common.contents import contents

if TYPE_CHECKING:
    from spp_export.models.shape import LAYOUTS as LAYOUTS
    from spp_export.models.shape import Layout as Layout
    from spp_export.planning.budget import DEFAULT_KEEP as DEFAULT_KEEP
    from spp_export.planning.budget import Budget as Budget
    from spp_export.planning.compile import Realised as Realised
    from spp_export.planning.compile import check_feasible as check_feasible
    from spp_export.planning.compile import compile_plan as compile_plan
    from spp_export.planning.compile import compile_units as compile_units
    from spp_export.planning.compile import cover as cover
    from spp_export.planning.compile import exactly as exactly
    from spp_export.planning.compile import forced_heads as forced_heads
    from spp_export.planning.compile import options_of as options_of
    from spp_export.planning.plan import COMPENSATIONS as COMPENSATIONS
    from spp_export.planning.plan import FILL as FILL
    from spp_export.planning.plan import Compensation as Compensation
    from spp_export.planning.plan import LayerPlan as LayerPlan
    from spp_export.planning.plan import Plan as Plan
    from spp_export.planning.plan import dense_plan as dense_plan
    from spp_export.planning.plan import sample_plan as sample_plan
    from spp_export.planning.plan_file import check_plan_target as check_plan_target
    from spp_export.planning.plan_file import parse_plan as parse_plan
    from spp_export.planning.plan_file import read_plan as read_plan
    from spp_export.planning.plan_file import validate_plan as validate_plan
    from spp_export.planning.plan_file import write_plan as write_plan

__getattr__, __dir__ = contents(__name__, __file__)
