"""`spp show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spp_cli import options
from spp_cli.output import Output


def show(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A plan, artifacts, an export, a dense model, or results of 'spp eval'.",
        ),
    ],
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Say what a file or directory is, and the main facts about it.

    Example: spp show out/chemistry
    """
    import spp_export

    out = Output(json=json, quiet=quiet)
    found = spp_export.show(path)

    from spp_cli.render.reports import shown_report

    out.result(found.to_dict, lambda look: shown_report(found, look), brief=found.kind)
