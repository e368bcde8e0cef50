"""`spp probe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from spp_cli import options
from spp_cli.hints import command_line, given
from spp_cli.output import Output


def probe(
    pools: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            rich_help_panel=options.MAKE,
            help="Text per domain: <domain>/train.txt and <domain>/val.txt.",
        ),
    ],
    output: Annotated[Path, options.output_option("Artifacts directory to write.")],
    model: options.Model = "demo",
    domains: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            rich_help_panel=options.MAKE,
            help="Domains to use, in this order; every sub-directory by default. Text of the "
            "others stands for unknown domains.",
        ),
    ] = None,
    select: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            rich_help_panel=options.MAKE,
            help="Take only K of the domains: those that lie apart and cover the rest best.",
        ),
    ] = None,
    criteria: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            rich_help_panel=options.MAKE,
            help="Criteria of importance to score units by; energy and axis by default.",
        ),
    ] = None,
    units: Annotated[
        Literal["heads", "both"],
        typer.Option(
            rich_help_panel=options.MAKE,
            help="What is scored: heads, or both heads and MLP channels.",
        ),
    ] = "both",
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Make a model's artifacts, once per model.

    Probes that know the domains of a text, and the importance of every unit for each domain.

    Example: spp probe --model org/name --pools pools -o artifacts
    """
    import spp_export

    out = Output(json=json, quiet=quiet)
    spp_export.probe(
        pools,
        output,
        model=model,
        domains=options.comma_list(domains),
        select=select,
        criteria=options.comma_list(criteria),
        units=units,
        seed=seed,
        force=force,
        device=device,
        dtype=dtype,
    )
    made = spp_export.show(output)

    from spp_cli.render.reports import shown_report

    out.result(made.to_dict, lambda look: shown_report(made, look), brief=str(output))
    scenario = "SCENARIO.txt"
    out.hint(command_line("export", model=given(model), artifacts=output, scenario=scenario))
