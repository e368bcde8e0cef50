"""`spp eval`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from spp_cli import options
from spp_cli.output import Output, write_warning

ROWS, TEXTS = "Rows", "Texts to judge on"


def evaluate(
    scenario: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            rich_help_panel=options.MAKE,
            help="Text that the deployed model will be asked; repeatable, each into a directory of "
            "its name.",
        ),
    ],
    output: Annotated[
        Path, options.output_option("Directory for the results; one begun before is continued.")
    ],
    wrong: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=ROWS,
            help="Another scenario, for the control that chooses by the wrong text; of several "
            "--scenario the next one by default.",
        ),
    ] = None,
    model: options.Model = "demo",
    artifacts: options.Artifacts = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE",
            rich_help_panel=ROWS,
            help="Share of the units' parameters that stays; repeatable, 0.9 to 0.5 by default.",
        ),
    ] = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=ROWS,
            help="A criterion of 'spp plan', probe-pruning, full-batch-probing, or all; "
            "repeatable. Controls and ablations vary the first.",
        ),
    ] = None,
    units: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[heads|channels|both]",
            rich_help_panel=ROWS,
            help="What may be removed; repeatable, heads by default.",
        ),
    ] = None,
    compensate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[none|bias|lstsq]",
            rich_help_panel=ROWS,
            help="How what stays makes up for what goes; repeatable, lstsq by default.",
        ),
    ] = None,
    comparable: options.Comparable = None,
    ablations: Annotated[
        bool,
        typer.Option(
            "--ablations",
            rich_help_panel=ROWS,
            help="Also the first criterion without the whitelist, and with one domain.",
        ),
    ] = False,
    other_artifacts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            rich_help_panel=ROWS,
            help="With --ablations, also the first criterion with these artifacts; repeatable.",
        ),
    ] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", rich_help_panel=ROWS, help="A plan to measure; repeatable."),
    ] = None,
    pools: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", rich_help_panel=TEXTS, help="Validation pools: <domain>/val.txt."
        ),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=TEXTS,
            help="A domain of --pools; repeatable, all by default.",
        ),
    ] = None,
    eval_set: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=TEXTS,
            help="Questions with answers, in the format of a scenario; repeatable.",
        ),
    ] = None,
    generate: Annotated[
        bool,
        typer.Option(
            "--generate",
            rich_help_panel=TEXTS,
            help="Also let every row answer the evaluation sets.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int,
        typer.Option(min=1, metavar="N", rich_help_panel=TEXTS, help="Longest answer."),
    ] = 48,
    curves: Annotated[
        bool,
        typer.Option("--curves/--no-curves", rich_help_panel=options.MAKE, help="Draw curves.png."),
    ] = True,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Measure what a scenario-specific model is worth, beside controls that can say no.

    Writes results.jsonl, table.md and curves.png. Interrupted, it goes on where it was.

    Example: spp eval --scenario chemistry.txt --wrong history.txt -o results
    """
    import spp_export

    out = Output(json=json, quiet=quiet)
    register_baselines(criterion or ())
    asked: dict[str, Any] = {
        "keeps": keep,
        "criteria": criterion,
        "units": units,
        "compensations": compensate,
        "domains": domain,
    }
    shared: dict[str, Any] = {
        "wrong": wrong,
        "model": model,
        "artifacts": artifacts,
        "other_artifacts": named_directories(other_artifacts or []),
        "request": spp_export.EvalRequest(
            **{name: tuple(values) for name, values in asked.items() if values},
            comparable=comparable,
            ablations=ablations,
            generate=generate,
            max_new_tokens=max_new_tokens,
            curves=curves,
            seed=seed,
        ),
        "pools": pools,
        "eval_sets": eval_set or [],
        "plans": plan or [],
        "force": force,
        "device": device,
        "dtype": dtype,
    }

    from spp_cli.render.evaluation import evaluation_report, evaluation_reports

    if len(scenario) == 1:
        result = spp_export.evaluate(scenario[0], output, **shared)
        out.result(
            result.to_dict,
            lambda look: evaluation_report(result, look),
            brief=str(result.directory),
        )
        if not wrong:
            out.hint("add --wrong FILE, for the control that chooses by another scenario")
        return
    results = spp_export.evaluate_scenarios(scenario, output, **shared)
    out.result(
        lambda: {"evaluations": [each.to_dict() for each in results]},
        lambda look: evaluation_reports(results, look),
        brief=str(output),
    )


def register_baselines(criteria: Sequence[str]) -> None:
    """Let the repository's benchmarks, where they are importable, add theirs to the criteria."""
    if find_spec("spp_campaigns") is not None:
        import spp_campaigns.probe_pruning  # noqa: F401
    elif "all" in criteria:
        write_warning("probe-pruning and full-batch-probing are left out: they need a clone of spp")


def named_directories(values: list[str]) -> dict[str, Path]:
    """NAME=DIR words as a mapping."""
    found = {}
    for value in values:
        name, sign, directory = value.partition("=")
        if not (name and sign and directory) or name in found:
            raise typer.BadParameter(
                f"--other-artifacts {value}: expected NAME=DIR, each name once."
            )
        found[name] = Path(directory)
    return found
