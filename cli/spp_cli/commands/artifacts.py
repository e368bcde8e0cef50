"""`spp artifacts import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spp_cli import options
from spp_cli.hints import command_line
from spp_cli.output import Output

artifacts_app = typer.Typer()


@artifacts_app.callback(invoke_without_command=True)
def artifacts(context: typer.Context) -> None:
    """Bring in artifacts made by other tools.

    Example: spp artifacts import results/ppd_pipeline -o artifacts
    """
    options.help_without_command(context)


@artifacts_app.command("import")
def import_(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Artifacts in the published format.")
    ],
    output: Annotated[Path, options.output_option("Artifacts directory to write.")],
    domains: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            rich_help_panel=options.MAKE,
            help="Names of the domains, in the order of the files; they do not hold them.",
        ),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Turn artifacts of the published format into ours.

    The probes are torch files; no code in them runs.

    Example: spp artifacts import results/ppd_pipeline -o artifacts
    """
    import spp_export

    out = Output(json=json, quiet=quiet)
    names = options.comma_list(domains)
    spp_export.import_artifacts(directory, output, domains=names, force=force)
    made = spp_export.show(output)

    from spp_cli.render.reports import shown_report

    out.result(made.to_dict, lambda look: shown_report(made, look), brief=str(output))
    out.hint(command_line("plan", model="DIR", artifacts=output, scenario="SCENARIO.txt"))
