"""`spp verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spp_cli import options
from spp_cli.output import Output, write_error


def verify(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A directory written by 'spp export'.")
    ],
    model: options.Model = "demo",
    scenario: options.ComparedText = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    layerwise: options.Layerwise = None,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check an export against the dense model it came from.

    Its files must be as they were written, and its logits those of the dense model with the same
    heads masked. The exit status is 1 where they are not.

    Example: spp verify out/chemistry --scenario chemistry.txt
    """
    import spp_export

    output = Output(json=json, quiet=quiet)
    report = spp_export.verify(
        out,
        model=model,
        scenario=scenario,
        device=device,
        dtype=dtype,
        layerwise=layerwise,
        seed=seed,
    )

    from spp_cli.render.sections import checks

    output.result(report.to_dict, lambda look: checks(report.to_dict()["checks"]))
    if not report.passed:
        failed = report.failures[0]
        write_error(f"{failed.name}: {failed.describe()}")
        raise typer.Exit(1)
