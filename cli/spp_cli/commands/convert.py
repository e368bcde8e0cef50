"""`spp convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from spp_cli import options
from spp_cli.converted_options import converted_options
from spp_cli.hints import command_line
from spp_cli.output import Output


def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="An export with safetensors, or a dense model: directory, hub id or demo.",
        ),
    ],
    output: Annotated[Path, options.output_option("Directory to write.")],
    format: Annotated[  # noqa: A002
        Literal["onnx", "gguf"],
        typer.Option(rich_help_panel=options.MAKE, help="What to write."),
    ] = "onnx",
    onnx_attention: options.OnnxAttention = None,
    precision: options.Precision = None,
    quant: options.Quant = None,
    scenario: options.ComparedText = None,
    device: options.Device = "cpu",
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify",
            rich_help_panel=options.DANGEROUS,
            help="Skip the comparison with the PyTorch model.",
        ),
    ] = False,
    keep_failed: options.KeepFailed = False,
) -> None:
    """Write an existing checkpoint, slim or dense, as ONNX or GGUF.

    Example: spp convert out/chemistry -o out/chemistry-onnx --scenario chemistry.txt
    """
    import spp_export

    out = Output(json=json, quiet=quiet)
    form = converted_options(format, onnx_attention, precision, quant, device)
    result = spp_export.convert(
        checkpoint,
        output,
        options=form,
        scenario=scenario,
        force=force,
        verify=not no_verify,
        keep_failed=keep_failed,
        device=device,
        seed=seed,
    )

    from spp_cli.render.summary import convert_summary

    out.result(result.to_dict, lambda look: convert_summary(result, look), brief=str(result.path))
    out.hint(command_line("chat", result.path, prompt="..."))
