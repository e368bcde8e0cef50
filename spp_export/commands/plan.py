"""`plan`: diagnose a scenario, score the heads for it, and choose what stays under a budget."""

from __future__ import annotations

import os

from spp_export.data.artifacts import open_artifacts
from spp_export.data.scenario import read_scenario
from spp_export.models.hub import DEMO
from spp_export.models.session import open_session
from spp_export.planning.planner import plan_scenario
from spp_export.planning.request import PlanRequest, PlanResult


def plan(
    scenario: str | os.PathLike[str],
    *,
    model: str = DEMO,
    artifacts: str | os.PathLike[str] | None = None,
    request: PlanRequest | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    layerwise: bool | None = None,
) -> PlanResult:
    """Compile the plan for a scenario file (or "-"); nothing is written.

    `layerwise` is as of `verify`.
    """
    request = request or PlanRequest()
    request.check()
    text = read_scenario(scenario)
    session = open_session(model, device=device, dtype=dtype, layerwise=layerwise)
    found = open_artifacts(artifacts, model, session.source)
    return plan_scenario(session, found, text, request)
