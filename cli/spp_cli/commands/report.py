"""`spp report`."""

from __future__ import annotations

from spp_cli.options import command
from spp_cli.output import Output
from spp_export.commands.requests import ReportRequest
from spp_export.common.options import non_default


@command(ReportRequest)
def report(request: ReportRequest, out: Output) -> None:
    """Write one page on an export: what was cut, what that saves, how it was checked and measured.

    The page is a single HTML file that needs no network.

    Example: spp report out/chemistry --bench bench.json --eval results -o chemistry.html
    """
    import spp_export

    result = spp_export.report(**non_default(request))

    from spp_cli.render.reports import written_page

    out.result(result.to_dict, lambda look: written_page(result, look), brief=str(result.path))
