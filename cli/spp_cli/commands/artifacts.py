"""`spp artifacts import`."""

from __future__ import annotations

import typer

from spp_cli.options import Command, Group, command, command_line, help_without_command
from spp_cli.output import Output
from spp_export.commands.requests import ImportRequest
from spp_export.common.options import non_default

artifacts_app = typer.Typer(cls=Group)


@artifacts_app.callback(invoke_without_command=True)
def artifacts(context: typer.Context) -> None:
    """Bring in artifacts made by other tools.

    Example: spp artifacts import results/ppd_pipeline -o artifacts
    """
    help_without_command(context)


@artifacts_app.command("import", cls=Command)
@command(ImportRequest)
def import_(request: ImportRequest, out: Output) -> None:
    """Turn artifacts of the published format into ours.

    The probes are torch files; no code in them runs.

    Example: spp artifacts import results/ppd_pipeline -o artifacts
    """
    import spp_export

    spp_export.import_artifacts(**non_default(request))
    made = spp_export.show(request.output)

    from spp_cli.render.reports import shown_report

    out.result(made.to_dict, lambda look: shown_report(made, look), brief=str(request.output))
    out.hint(command_line("plan", model="DIR", artifacts=request.output, scenario="SCENARIO.txt"))
