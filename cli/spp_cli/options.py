"""Options that several commands share, under the same name and with the same meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from spp_cli.units import parse_count

MAKE, BUDGET, CHECKS = "What to make", "Budget", "Checks"
RUNNING, DANGEROUS = "Running", "Dangerous"


def _count(text: str) -> int:
    try:
        return parse_count(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from None


def comma_list(text: str | None) -> tuple[str, ...] | None:
    """The words of a list a,b,c; None stays None."""
    if text is None:
        return None
    return tuple(word.strip() for word in text.split(","))


Model = Annotated[
    str,
    typer.Option(
        metavar="DIR|HUB_ID|demo", rich_help_panel=MAKE, help="The dense model to start from."
    ),
]
Artifacts = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        rich_help_panel=MAKE,
        help="The model's artifacts, made by 'spp probe'; the demo model's come with spp.",
    ),
]
Scenario = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        rich_help_panel=MAKE,
        help="Text that the deployed model will be asked: .txt, .jsonl or .json; - is standard "
        "input.",
    ),
]
Layout = Annotated[
    Literal["uniform", "per-layer"],
    typer.Option(
        rich_help_panel=MAKE,
        help="uniform: every layer alike, a stock model. per-layer: layers differ, and less is "
        "lost.",
    ),
]
Criterion = Annotated[
    Literal["obs", "energy", "axis"] | None,
    typer.Option(
        rich_help_panel=MAKE,
        help="Importance of a head; by default obs where compensation is lstsq, else energy.",
    ),
]
Policy = Annotated[
    Literal["exact", "published"],
    typer.Option(
        rich_help_panel=MAKE,
        help="exact: the best plan under the budget. published: the released algorithm, for "
        "comparison.",
    ),
]
Compensate = Annotated[
    Literal["none", "bias", "lstsq"],
    typer.Option(
        rich_help_panel=MAKE,
        help="How the kept weights make up for what is removed; lstsq by default.",
    ),
]
Regime = Annotated[
    Literal["in-domain", "cross-domain", "out-of-domain"] | None,
    typer.Option(
        rich_help_panel=MAKE, help="Probe temperatures to use; chosen from the text by default."
    ),
]
Keep = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        rich_help_panel=BUDGET,
        help="Share of the q, k, v and o parameters that stays; 0.8 where no budget is given.",
    ),
]
MaxParams = Annotated[
    int | None,
    typer.Option(
        parser=_count,
        metavar="N",
        rich_help_panel=BUDGET,
        help="Most parameters of the whole slim model; 12k, 1.5M and 2G are understood.",
    ),
]
MaxKvBytes = Annotated[
    int | None,
    typer.Option(
        parser=_count,
        metavar="N",
        rich_help_panel=BUDGET,
        help="Most bytes of KV cache per token, in the stored dtype.",
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        metavar="ETA",
        rich_help_panel=BUDGET,
        help="From 0 to 1; higher removes more, and narrow scenarios lose more than broad ones.",
    ),
]
Device = Annotated[
    str,
    typer.Option(metavar="NAME", rich_help_panel=RUNNING, help="cpu, cuda, cuda:1, auto."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "float64"] | None,
    typer.Option(
        rich_help_panel=RUNNING,
        help="Precision to compute in: float32 on the CPU, else the stored one.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", rich_help_panel=RUNNING, help="Seed of everything drawn at random."
    ),
]
Json = Annotated[
    bool, typer.Option("--json", rich_help_panel=RUNNING, help="One JSON object on stdout.")
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", rich_help_panel=RUNNING, help="No progress, tables or hints."),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", rich_help_panel=DANGEROUS, help="Replace an output that spp wrote before."
    ),
]


def help_without_command(context: typer.Context) -> None:
    """A group by itself asks for nothing: show what there is, and exit with 2."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def output_option(help_text: str) -> Any:
    """-o/--output, whose meaning each command states."""
    return typer.Option("--output", "-o", metavar="PATH", rich_help_panel=MAKE, help=help_text)
