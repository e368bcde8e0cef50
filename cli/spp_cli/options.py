"""Options that several commands share, under the same name and with the same meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from spp_cli.units import parse_count

MAKE, BUDGET, CHECKS = "What to make", "Budget", "Checks"
CONVERTED = "ONNX graph, GGUF file"
PUBLISHING, RUNNING, DANGEROUS = "Publishing", "Running", "Dangerous"


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
ComparedText = Annotated[
    str | None,
    typer.Option(
        "--scenario",
        metavar="FILE",
        rich_help_panel=CHECKS,
        help="Text to compare logits on, or - for standard input; random tokens without it.",
    ),
]
KeepFailed = Annotated[
    bool,
    typer.Option(
        "--keep-failed",
        rich_help_panel=DANGEROUS,
        help="Publish even when a check fails; the exit status is 1 all the same.",
    ),
]
Layout = Annotated[
    Literal["uniform", "per-layer", "ragged"],
    typer.Option(
        rich_help_panel=MAKE,
        help="uniform: every layer alike, a stock model. per-layer: layers differ, and less is "
        "lost. ragged: single query heads go, for transformers alone.",
    ),
]
Units = Annotated[
    Literal["heads", "channels", "both"],
    typer.Option(
        rich_help_panel=MAKE, help="What may be removed: attention heads, MLP channels, or both."
    ),
]
# Not typed out as a choice: a new criterion takes one file of the library, and no change here.
Criterion = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=MAKE,
        help="Importance of a unit; by default obs where compensation is lstsq, else energy. "
        "Others are axis, taylor, wanda-sp, flap, ppsp, llm-pruner, ...; a wrong name lists all.",
    ),
]
Comparable = Annotated[
    Literal["standardised", "share", "raw", "shifted", "stream"] | None,
    typer.Option(
        rich_help_panel=MAKE,
        help="How scores of different layers are made comparable; the criterion's own way by "
        "default.",
    ),
]
Shrinkage = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        rich_help_panel=MAKE,
        help="How far the diagnosed mixture is shrunk towards all domains alike, 0 to 1; chosen on "
        "validation text by default.",
    ),
]
Adapt = Annotated[
    bool,
    typer.Option(
        "--adapt/--no-adapt",
        rich_help_panel=MAKE,
        help="Let the scenario's own text add its statistics to the pools'.",
    ),
]
WidthMultiple = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        rich_help_panel=BUDGET,
        help="MLP widths are multiples of this many channels.",
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
        help="Share of the parameters of the units that stays: of q, k, v and o for heads; 0.8 "
        "where no budget is given. Of what --cost says, where that is another.",
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
MaxLatency = Annotated[
    float | None,
    typer.Option(
        metavar="MS",
        rich_help_panel=BUDGET,
        help="Most milliseconds of a step of the slim model by the profile; with --cost latency.",
    ),
]
Cost = Annotated[
    Literal["params", "kv-bytes", "latency"],
    typer.Option(
        rich_help_panel=BUDGET,
        help="What units compete by, and what --keep is a share of: their parameters, the KV "
        "cache, or the time of their blocks by --profile.",
    ),
]
Profile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=BUDGET,
        help="Table of latency for --cost latency, written by 'spp bench --profile'.",
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tp",
        min=1,
        metavar="N",
        rich_help_panel=BUDGET,
        help="Cards that a server will spread every layer over: heads and channels divide by it.",
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
OnnxAttention = Annotated[
    Literal["gqa", "gqa-bias", "standard"] | None,
    typer.Option(
        rich_help_panel=CONVERTED,
        help="gqa (the default) is fastest and pads on the right; gqa-bias pads on either side; "
        "standard is for other runtimes, and for fp32 on CUDA.",
    ),
]
Precision = Annotated[
    Literal["fp32", "fp16", "bf16"] | None,
    typer.Option(
        rich_help_panel=CONVERTED,
        help="Of an ONNX graph: fp32 on the CPU, fp16 on CUDA. Of a GGUF file: the stored one.",
    ),
]
Quant = Annotated[
    Literal["int8", "int4", "int8-dynamic", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] | None,
    typer.Option(
        rich_help_panel=CONVERTED,
        help="Round weights in small blocks: int8 and int4 for ONNX, and int8-dynamic, which "
        "rounds activations too; q8_0 to q4_0 for GGUF.",
    ),
]
Private = Annotated[
    bool,
    typer.Option(
        "--private",
        rich_help_panel=PUBLISHING,
        help="Make a private repository, where there is none yet.",
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
Layerwise = Annotated[
    bool | None,
    typer.Option(
        "--layerwise/--no-layerwise",
        rich_help_panel=RUNNING,
        help="Run models layer by layer, their weights staying on disk; by default where they do "
        "not fit in memory.",
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
