"""`spp frontier`."""

from __future__ import annotations

from spp_cli.options import command, command_line
from spp_cli.output import Output
from spp_export.commands.requests import FrontierRequest
from spp_export.common.options import non_default


@command(FrontierRequest)
def frontier(request: FrontierRequest, out: Output) -> None:
    """Try many sizes of a scenario's model, and show what each costs in quality.

    Example: spp frontier --scenario chemistry.txt --units both -o out/frontier
    """
    import spp_export

    result = spp_export.frontier(**non_default(request))

    from spp_cli.render.frontier import frontier_table

    out.result(result.to_dict, lambda look: frontier_table(result), brief=str(result.path))
    at = result.files[list(result.plans).index(result.knee)]
    out.hint(
        command_line(
            "export",
            scenario=request.scenario,
            answers=request.answers,
            model=non_default(request).get("model"),
            artifacts=request.artifacts,
            plan=at,
        )
    )
