"""`spp bench`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from spp_cli import options
from spp_cli.output import Output, write_error
from spp_cli.profiling import only, write_profile
from spp_export.common.errors import UsageError

GRID, MEASURING, PROFILE = "Grid", "Measuring", "Table of latency"
SHAPE = "Shape without weights"


def bench(
    out: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="OUT...", help="Directories written by 'spp export', safetensors or ONNX."
        ),
    ] = None,
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
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=SHAPE,
            help="Instead of OUT and --model, a published model's sizes with random weights: "
            "qwen2.5-7b, llama-3.1-8b, ...; a wrong name lists all.",
        ),
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE",
            rich_help_panel=SHAPE,
            help="Share of the units' parameters that a plan keeps; repeatable, 0.8 by default.",
        ),
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            metavar="per-layer|uniform",
            rich_help_panel=SHAPE,
            help="Layout of a plan; repeatable, per-layer by default.",
        ),
    ] = None,
    units: Annotated[
        list[str] | None,
        typer.Option(
            metavar="heads|channels|both",
            rich_help_panel=SHAPE,
            help="What a plan removes; repeatable, heads by default.",
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            rich_help_panel=PROFILE,
            help="Instead, time the model's blocks of every size, and write the table to -o for "
            "'spp plan --cost latency'.",
        ),
    ] = False,
    phase: Annotated[
        Literal["decode", "prefill"],
        typer.Option(rich_help_panel=PROFILE, help="Which steps the table is of."),
    ] = "decode",
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
    if profile:
        table = {"phase": phase, "threads": threads, "device": device, "dtype": dtype, "seed": seed}
        cell = {"batch": only("--batch", batch, 1), "context": only("--context", context, 128)}
        shown = Output(json=json, quiet=quiet)
        write_profile(out, model, {**table, **cell}, output, force, shown, shape)
        return
    if bool(out) == (shape is not None):
        raise UsageError("Give either directories written by 'spp export' as OUT, or --shape.")
    from spp_bench.bench import BenchRequest
    from spp_bench.bench import bench as bench_outs

    shown = Output(json=json, quiet=quiet)
    request = BenchRequest(
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
    )
    if shape is not None:
        from spp_bench.shapes.bench import bench_shape
        from spp_bench.shapes.plans import variants

        run = partial(bench_shape, shape, variants(keep, layout, units))
    else:
        run = partial(bench_outs, out or (), model=model)
    document = run(
        request=request,
        results=output,
        plots=plot,
        force=force,
    )

    from spp_cli.render.benchmark import benchmark_report

    shown.result(lambda: document, lambda look: benchmark_report(document))
    if document["problems"]:
        for problem in document["problems"]:
            write_error(problem)
        raise typer.Exit(1)
