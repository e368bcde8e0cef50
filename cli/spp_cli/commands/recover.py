"""`spp recover`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spp_cli import options
from spp_cli.hints import command_line, given
from spp_cli.output import Output

TRAINING = "Training"


def recover(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A safetensors directory by 'spp export'.")
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            rich_help_panel=options.MAKE,
            help="Text to train on: .txt, .jsonl or .json as a scenario, or - for standard input.",
        ),
    ],
    output: Annotated[
        Path | None, options.output_option("Directory to write; OUT-recovered by default.")
    ] = None,
    model: options.Model = "demo",
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=options.CHECKS,
            help="Text to measure on; by default every fourth text of --data, which is then not "
            "trained on.",
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=TRAINING, help="Optimiser steps.")
    ] = 200,
    rank: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=TRAINING, help="Of the adapters.")
    ] = 8,
    alpha: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", rich_help_panel=TRAINING, help="Adapters count alpha / rank times."
        ),
    ] = 16,
    learning_rate: Annotated[
        float,
        typer.Option(metavar="RATE", rich_help_panel=TRAINING, help="At its highest."),
    ] = 5e-4,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=TRAINING, help="Texts per step.")
    ] = 4,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=2, metavar="N", rich_help_panel=TRAINING, help="Longest part of a text to read."
        ),
    ] = 256,
    device: options.Device = "cpu",
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
    keep_failed: options.KeepFailed = False,
) -> None:
    """Train an export for a few steps with LoRA, and write the merged model.

    The result has the layout of OUT and is checked as an export is. It is published only where it
    predicts text that it was not trained on better than OUT. An interrupted run goes on where it
    was. Needs the extra spp-export[recover].

    Example: spp recover out/chemistry --data chemistry.jsonl --steps 200 -o out/recovered
    """
    import spp_export

    show = Output(json=json, quiet=quiet)
    settings = spp_export.RecoverSettings(
        steps=steps,
        rank=rank,
        alpha=alpha,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_tokens=max_tokens,
        seed=seed,
    )
    found = spp_export.recover(
        out,
        data,
        output,
        model=model,
        validation=validation,
        settings=settings,
        force=force,
        keep_failed=keep_failed,
        device=device,
    )

    from spp_cli.render.summary import recover_summary

    show.result(found.to_dict, lambda look: recover_summary(found, look), brief=str(found.path))
    show.hint(command_line("verify", found.path, model=given(model)))
