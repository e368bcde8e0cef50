"""`spp show`."""

from __future__ import annotations

from spp_cli.options import command
from spp_cli.output import Output
from spp_export.commands.requests import ShowRequest
from spp_export.common.options import non_default


@command(ShowRequest)
def show(request: ShowRequest, out: Output) -> None:
    """Say what a file or directory is, and the main facts about it.

    Example: spp show out/chemistry
    """
    import spp_export

    shown = spp_export.show(**non_default(request))

    from spp_cli.render.reports import shown_report

    out.result(shown.to_dict, lambda look: shown_report(shown, look), brief=shown.kind)
