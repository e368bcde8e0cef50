"""`spp bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spp_cli import options
from spp_cli.output import Output, write_error

GRID, MEASURING = "Grid", "Measuring"


def bench(
    out: Annotated[
        list[Path],
        typer.Argument(
            metavar="OUT...", help="Directories written by 'spp export', safetensors or ONNX."
        ),
    ],
    model: options.Model = "demo",
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1, metavar="N", rich_help_panel=GRID, help="Batch size; repeatable, 1 by default."
        ),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=GRID,
            help="Tokens of a prompt; repeatable, 128 by default.",
        ),
    ] = None,
    new_tokens: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", rich_help_panel=GRID, help="Tokens decoded after each prompt."
        ),
    ] = 32,
    rounds: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=MEASURING,
            help="Times that every model runs, in turn; one more round warms up.",
        ),
    ] = 9,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=MEASURING,
            help="Threads of every engine; all physical cores by default.",
        ),
    ] = None,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory/--no-memory",
            rich_help_panel=MEASURING,
            help="Measure memory, a fresh process per model.",
        ),
    ] = True,
    genai: Annotated[
        bool,
        typer.Option(
            "--genai/--no-genai",
            rich_help_panel=MEASURING,
            help="Also run ONNX directories in onnxruntime-genai, where it is installed.",
        ),
    ] = True,
    output: Annotated[
        Path | None,
        options.output_option("Results as JSON; cells that the file has are not measured again."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=options.MAKE,
            help="Draw speed-up and memory over context as PNGs.",
        ),
    ] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Measure speed and memory of exports beside the dense model, with the bound on every gain.

    Parity comes first: there are no figures of a model that fails it. The exit status is 1 where
    it fails, where a speed-up is above its bound, and where memory is not what the plan predicts.

    Example: spp bench out/chemistry --context 128 --context 1024 -o bench.json
    """
    from spp_bench.bench import BenchRequest
    from spp_bench.bench import bench as run

    shown = Output(json=json, quiet=quiet)
    document = run(
        out,
        model=model,
        request=BenchRequest(
            batches=tuple(batch or (1,)),
            contexts=tuple(context or (128,)),
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            device=device,
            dtype=dtype,
            memory=memory,
            genai=genai,
            seed=seed,
        ),
        results=output,
        plots=plot,
        force=force,
        progress=shown.progress,
    )

    from spp_cli.benchmark import benchmark_report

    shown.result(lambda: document, lambda look: benchmark_report(document))
    if document["problems"]:
        for problem in document["problems"]:
            write_error(problem)
        raise typer.Exit(1)
