"""`spp report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spp_cli import options
from spp_cli.output import Output

MEASURED = "Measured before"


def report(
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A directory written by 'spp export', or a plan."),
    ],
    output: Annotated[
        Path | None, options.output_option("The page; beside OUT, with its name, by default.")
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=MEASURED, help="Results of 'spp bench -o', to draw."
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            metavar="PATH",
            rich_help_panel=MEASURED,
            help="Results of 'spp eval -o', a directory or its file, to draw.",
        ),
    ] = None,
    artifacts: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=MEASURED,
            help="Artifacts for the scores of heads; the demo model's come with spp.",
        ),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Write one page on an export: what was cut, what that saves, how it was checked and measured.

    The page is a single HTML file that needs no network.

    Example: spp report out/chemistry --bench bench.json --eval results -o chemistry.html
    """
    import spp_export

    shown = Output(json=json, quiet=quiet)
    result = spp_export.report(
        out, output=output, bench=bench, evaluation=evaluation, artifacts=artifacts, force=force
    )

    from spp_cli.render.reports import written_page

    shown.result(result.to_dict, lambda look: written_page(result, look), brief=str(result.path))
