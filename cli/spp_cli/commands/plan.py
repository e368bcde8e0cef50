"""`spp plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from spp_cli import options
from spp_cli.hints import asked, command_line, given
from spp_cli.output import Output


def plan(
    scenario: options.Scenario,
    output: Annotated[
        Path | None, options.output_option("Where to write the plan; without it, only show it.")
    ] = None,
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
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    layerwise: options.Layerwise = None,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Decide what an export would keep, and what that saves at best.

    Example: spp plan --scenario chemistry.txt --keep 0.8 -o plan.json
    """
    import spp_export
    from spp_export.planning import check_plan_target, write_plan

    out = Output(json=json, quiet=quiet)
    request = spp_export.PlanRequest(
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
        seed=seed,
        cost=cost,
        profile=profile,
        max_latency=max_latency,
        tp=tp,
    )
    if output is not None:
        check_plan_target(output, force)
    result = spp_export.plan(
        scenario,
        model=model,
        artifacts=artifacts,
        request=request,
        device=device,
        dtype=dtype,
        layerwise=layerwise,
    )
    if output is not None:
        write_plan(result.plan, output, force=force)

    from spp_cli.render.summary import plan_summary

    out.result(
        result.to_dict,
        lambda look: plan_summary(result, str(output or "plan"), look),
        brief=str(output or ""),
    )
    decided = {"plan": output} if output else {"artifacts": artifacts, **asked(request)}
    out.hint(command_line("export", scenario=scenario, model=given(model), **decided))
