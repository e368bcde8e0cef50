"""`spp export`."""

from __future__ import annotations

from spp_cli.options import command, command_line
from spp_cli.output import Output
from spp_export.commands.requests import ExportRequest
from spp_export.common.options import non_default


@command(ExportRequest)
def export(request: ExportRequest, out: Output) -> None:
    """Write a scenario's slim model: diagnose, plan, slice, check.

    Example: spp export --scenario chemistry.txt --keep 0.8 -o out/chemistry
    """
    import spp_export

    result = spp_export.export(**non_default(request))

    from spp_cli.render.look import peak_memory
    from spp_cli.render.summary import export_summary

    peak = peak_memory()
    path = "" if result.path is None else str(result.path)
    out.result(result.to_dict, lambda look: export_summary(result, look, peak), brief=path)
    if result.pushed:
        out.note(f"pushed to {result.pushed.url}")
    if path:
        if not request.verify:
            model = non_default(request).get("model")
            out.hint(command_line("verify", path, model=model, scenario=request.scenario))
        out.hint(command_line("chat", path, prompt="..."))
