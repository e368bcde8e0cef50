"""`spp diagnose`."""

from __future__ import annotations

from typing import Annotated

import typer

from spp_cli import options
from spp_cli.output import Output


def diagnose(
    scenario: options.Scenario,
    model: options.Model = "demo",
    artifacts: options.Artifacts = None,
    regime: options.Regime = None,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers", rich_help_panel=options.MAKE, help="Also the probabilities per layer."
        ),
    ] = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    layerwise: options.Layerwise = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show which knowledge domains a scenario draws on.

    Example: spp diagnose --scenario chemistry.txt --layers
    """
    import spp_export

    out = Output(json=json, quiet=quiet)
    found = spp_export.diagnose(
        scenario,
        model=model,
        artifacts=artifacts,
        regime=regime,
        device=device,
        dtype=dtype,
        layerwise=layerwise,
    )

    from spp_cli.render.reports import diagnosis_report

    out.result(
        lambda: found.to_dict(layers=layers),
        lambda look: diagnosis_report(found.to_dict(layers=layers), look),
        brief=" ".join(f"{d}={share:.4f}" for d, share in found.to_dict()["mixture"].items()),
    )
