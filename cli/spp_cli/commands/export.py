"""`spp export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from spp_cli import options
from spp_cli.converted_options import converted_options
from spp_cli.hints import asked, command_line, given
from spp_cli.output import Output
from spp_export.common.errors import UsageError


def export(
    scenario: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=options.MAKE,
            help="Text that the deployed model will be asked: .txt, .jsonl or .json; - is standard "
            "input. With --plan it only serves the checks and the compensation.",
        ),
    ] = None,
    output: Annotated[
        Path | None, options.output_option("Directory to write; out/<scenario> by default.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=options.MAKE,
            help="A plan from 'spp plan', instead of deciding anew.",
        ),
    ] = None,
    format: Annotated[  # noqa: A002
        Literal["safetensors", "onnx", "gguf"],
        typer.Option(
            rich_help_panel=options.MAKE,
            help="safetensors for transformers and vLLM, onnx for ONNX Runtime, gguf for "
            "llama.cpp.",
        ),
    ] = "safetensors",
    pad: Annotated[
        bool,
        typer.Option(
            "--pad",
            rich_help_panel=options.MAKE,
            help="Fill the groups of ragged layers with heads of zeros, and write layers for other "
            "engines; a budget does not count them.",
        ),
    ] = False,
    onnx_attention: options.OnnxAttention = None,
    precision: options.Precision = None,
    quant: options.Quant = None,
    model: options.Model = "demo",
    artifacts: options.Artifacts = None,
    units: options.Units = "heads",
    layout: options.Layout = "per-layer",
    criterion: options.Criterion = None,
    comparable: options.Comparable = None,
    policy: options.Policy = "exact",
    compensate: options.Compensate = "lstsq",
    regime: options.Regime = None,
    shrinkage: options.Shrinkage = None,
    adapt: options.Adapt = True,
    keep: options.Keep = None,
    max_params: options.MaxParams = None,
    max_kv_bytes: options.MaxKvBytes = None,
    strength: options.Strength = None,
    cost: options.Cost = "params",
    profile: options.Profile = None,
    max_latency: options.MaxLatency = None,
    width_multiple: options.WidthMultiple = 64,
    tp: options.TensorParallel = 1,
    max_perplexity: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            rich_help_panel=options.CHECKS,
            help="Publish only if held-out perplexity is at most R times the dense model's.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            rich_help_panel=options.CHECKS,
            help="Decide, list the tensors that would change, and write nothing.",
        ),
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            rich_help_panel=options.PUBLISHING,
            help="Upload the checked export to this repository of the Hugging Face Hub.",
        ),
    ] = None,
    private: options.Private = False,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    layerwise: options.Layerwise = None,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify",
            rich_help_panel=options.DANGEROUS,
            help="Skip the checks against the masked dense model.",
        ),
    ] = False,
    keep_failed: options.KeepFailed = False,
    save_svg: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Write a scenario's slim model: diagnose, plan, slice, check.

    Example: spp export --scenario chemistry.txt --keep 0.8 -o out/chemistry
    """
    import spp_export

    out = Output(json=json, quiet=quiet)
    plan_request = spp_export.PlanRequest(
        keep=keep,
        max_params=max_params,
        max_kv_bytes=max_kv_bytes,
        strength=strength,
        layout=layout,
        criterion=criterion,
        policy=policy,
        compensate=compensate,
        regime=regime,
        units=units,
        comparable=comparable,
        width_multiple=width_multiple,
        shrinkage=shrinkage,
        adapt=adapt,
        # With a plan there is nothing left to draw; the checks have the seed from the request.
        seed=seed if plan is None else 0,
        cost=cost,
        profile=profile,
        max_latency=max_latency,
        tp=tp,
    )
    form = converted_options(format, onnx_attention, precision, quant, device)
    _check(plan, asked(plan_request), max_perplexity, no_verify or dry_run)
    if private and push_to_hub is None:
        raise UsageError("--private: nothing is uploaded. Add --push-to-hub ID, or drop --private.")
    result = spp_export.export(
        scenario,
        output,
        model=model,
        artifacts=artifacts,
        plan=plan,
        plan_request=plan_request,
        request=spp_export.ExportRequest(
            force=force,
            verify=not no_verify,
            keep_failed=keep_failed,
            dry_run=dry_run,
            max_perplexity_ratio=max_perplexity,
            seed=seed,
            onnx=form if isinstance(form, spp_export.OnnxOptions) else None,
            gguf=form if isinstance(form, spp_export.GgufOptions) else None,
            pad=pad,
            push_to_hub=push_to_hub,
            private=private,
        ),
        device=device,
        dtype=dtype,
        layerwise=layerwise,
    )

    from spp_cli.render.summary import export_summary, save_picture
    from spp_cli.units import peak_memory

    peak = peak_memory()
    path = "" if result.path is None else str(result.path)
    out.result(result.to_dict, lambda look: export_summary(result, look, peak), brief=path)
    if save_svg is not None:
        save_picture(lambda look: export_summary(result, look, peak), save_svg)
    if result.pushed:
        out.note(f"pushed to {result.pushed.url}")
    if path:
        out.hint(command_line("verify", path, model=given(model), scenario=scenario))
        out.hint(command_line("chat", path, prompt="..."))


def _check(
    plan: Path | None,
    decided: dict[str, object],
    max_perplexity: float | None,
    unchecked: bool,
) -> None:
    """Refuse what would otherwise be ignored without a word."""
    if plan is not None and decided:
        flag = "--" + next(iter(decided)).replace("_", "-")
        raise UsageError(f"{flag}: the plan already decides that. Drop {flag}, or --plan.")
    if max_perplexity is not None and unchecked:
        raise UsageError("--max-perplexity: nothing is measured then. Drop --no-verify, --dry-run.")
    if max_perplexity is not None and not max_perplexity > 0:
        raise UsageError(f"--max-perplexity {max_perplexity:g}: expected a ratio above 0.")
