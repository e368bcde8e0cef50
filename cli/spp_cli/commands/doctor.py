"""`spp doctor`."""

from __future__ import annotations

import typer

from spp_cli.options import command
from spp_cli.output import Output
from spp_export.common.options import Request


@command(Request)
def doctor(_: Request, out: Output) -> None:
    """Show versions, devices, caches, and which engines are installed.

    The exit status is 1 where something would stop spp from working.

    Example: spp doctor
    """
    import spp_export

    examination = spp_export.doctor()

    from spp_cli.render.examination import examination_report

    out.result(
        examination.to_dict,
        lambda look: examination_report(examination, look),
        brief="\n".join(examination.problems) or "ok",
    )
    if examination.problems:
        raise typer.Exit(1)
