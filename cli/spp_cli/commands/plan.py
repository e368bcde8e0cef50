"""`spp plan`."""

from __future__ import annotations

from spp_cli.options import command, command_line
from spp_cli.output import Output
from spp_export.commands.requests import PlanFileRequest
from spp_export.common.options import non_default
from spp_export.planning.request import PlanRequest


@command(PlanFileRequest)
def plan(request: PlanFileRequest, out: Output) -> None:
    """Decide what an export would keep, and what that saves at best.

    Example: spp plan --scenario chemistry.txt --keep 0.8 -o plan.json
    """
    import spp_export

    result = spp_export.plan(**non_default(request))
    output = request.output

    from spp_cli.render.summary import plan_summary

    out.result(
        result.to_dict,
        lambda look: plan_summary(result, str(output or "plan"), look),
        brief=str(output or ""),
    )
    decided = {"artifacts": request.artifacts, **non_default(request, PlanRequest)}
    out.hint(
        command_line(
            "export",
            scenario=request.scenario,
            answers=request.answers,
            model=non_default(request).get("model"),
            **({"plan": output} if output else decided),
        )
    )
