"""`spp diagnose`."""

from __future__ import annotations

from dataclasses import dataclass

from spp_cli.options import command
from spp_cli.output import Output
from spp_export.commands.requests import DiagnoseRequest
from spp_export.common.options import non_default, option


@dataclass(frozen=True, kw_only=True)
class ShownDiagnosis(DiagnoseRequest):
    """A diagnosis, and how much of it is shown."""

    layers: bool = option(False, help="Also the probabilities per layer.")


@command(ShownDiagnosis)
def diagnose(request: ShownDiagnosis, out: Output) -> None:
    """Show which knowledge domains a scenario draws on.

    Example: spp diagnose --scenario chemistry.txt --layers
    """
    import spp_export

    diagnosis = spp_export.diagnose(**non_default(request, DiagnoseRequest))

    from spp_cli.render.reports import diagnosis_report

    shown = diagnosis.to_dict(layers=request.layers)
    out.result(
        lambda: shown,
        lambda look: diagnosis_report(shown, look),
        brief=" ".join(f"{name}={share:.4f}" for name, share in shown["mixture"].items()),
    )
