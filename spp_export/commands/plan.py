"""`plan`: diagnose a scenario, score the units for it, and choose what stays under a budget."""

from __future__ import annotations

from dataclasses import replace

from spp_export.calibration.stored import noting
from spp_export.commands.requests import PlanFileRequest
from spp_export.common.options import command
from spp_export.data.answer_file import with_answers
from spp_export.data.artifacts import open_artifacts
from spp_export.data.scenario import read_scenario
from spp_export.models.session import open_session
from spp_export.planning.plan_file import check_plan_target, write_plan
from spp_export.planning.planner import PlanResult, plan_scenario


@command(PlanFileRequest)
def plan(request: PlanFileRequest) -> PlanResult:
    """Decide what an export of a scenario would keep; nothing is written but the plan, and only
    where `output` says so.

        result = spp_export.plan("chemistry.txt", keep=0.8, output="plan.json")
    """
    if request.output is not None:
        check_plan_target(request.output, request.force)
    text = with_answers(read_scenario(request.scenario), request.answers)
    session = open_session(
        request.model,
        device=request.device,
        dtype=request.dtype,
        matmul=request.matmul,
        layerwise=request.layerwise,
        dequantize=request.dequantize,
        parallel=request.parallel,
    )
    artifacts = open_artifacts(request.artifacts, request.model, session.source)
    with noting() as kept:
        result = replace(plan_scenario(session, artifacts, text, request), kept=kept)
    if request.output is not None:
        write_plan(result.plan, request.output, force=request.force)
    return result
