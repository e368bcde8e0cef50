"""`spp doctor`."""

from __future__ import annotations

import typer

from spp_cli import options
from spp_cli.output import Output


def doctor(json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Show versions, devices, caches, and which engines are installed.

    The exit status is 1 where something would stop spp from working.

    Example: spp doctor
    """
    import spp_export

    out = Output(json=json, quiet=quiet)
    found = spp_export.doctor()

    from spp_cli.render.examination import examination_report

    out.result(
        found.to_dict,
        lambda look: examination_report(found, look),
        brief="\n".join(found.problems) or "ok",
    )
    if found.problems:
        raise typer.Exit(1)
