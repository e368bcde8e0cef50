"""`spp probe`."""

from __future__ import annotations

from spp_cli.options import command, command_line
from spp_cli.output import Output
from spp_export.commands.requests import ProbeRequest
from spp_export.common.options import non_default


@command(ProbeRequest)
def probe(request: ProbeRequest, out: Output) -> None:
    """Make a model's artifacts, once per model.

    Probes that know the domains of a text, and the importance of every unit for each domain.

    Example: spp probe --model org/name --pools pools -o artifacts
    """
    import spp_export

    spp_export.probe(**non_default(request))
    made = spp_export.show(request.output)

    from spp_cli.render.reports import shown_report

    out.result(made.to_dict, lambda look: shown_report(made, look), brief=str(request.output))
    model = non_default(request).get("model")
    out.hint(command_line("export", model=model, artifacts=request.output, scenario="SCENARIO.txt"))
