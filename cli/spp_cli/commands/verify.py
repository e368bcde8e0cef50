"""`spp verify`."""

from __future__ import annotations

import typer

from spp_cli.options import command
from spp_cli.output import Output, write_error
from spp_export.commands.requests import VerifyRequest
from spp_export.common.options import non_default


@command(VerifyRequest)
def verify(request: VerifyRequest, out: Output) -> None:
    """Check an export against the dense model it came from.

    Its files must be as they were written, and its logits those of the dense model with the same
    heads masked. The exit status is 1 where they are not.

    Example: spp verify out/chemistry --scenario chemistry.txt
    """
    import spp_export

    report = spp_export.verify(**non_default(request))

    from spp_cli.render.summary import verify_summary

    out.result(report.to_dict, lambda look: verify_summary(report.to_dict()))
    if not report.passed:
        failed = report.failures[0]
        write_error(f"{failed.name}: {failed.describe()}")
        raise typer.Exit(1)
