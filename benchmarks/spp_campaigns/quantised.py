"""What llm-compressor costs after the cut: `python -m spp_campaigns.quantised out/chemistry`.

Quantises the dense model and an export of it by each recipe, loads what was written with
transformers, and measures the mean KL to the dense model on its answers to held-out prompts of the
scenario: of the slim model, of the dense one quantised, and of the slim one quantised. Runs where
llm-compressor is: `make quantised` has an environment for it.

Recipes, all by rounding to the nearest: int8 has 8 bits and a scale per row of a weight, and
activations in 8 bits per token as the model runs; int7 is int8 with weights in 7 of its 8 bits;
int4 has 4 bits and a scale per group of a row.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

import spp_export.models.modeling  # noqa: F401  registers the per-layer classes
from spp_campaigns.choices import Answers
from spp_campaigns.command import finish, machine, parser, scratch, table
from spp_export.common.errors import UsageError
from spp_export.data.scenario import read_scenario
from spp_export.evaluation.harness.yardsticks import quantised_bits
from spp_export.models.loader import load_slim
from spp_export.models.session import open_session
from spp_export.planning import read_plan

RECIPES = ("int8", "int7", "int4")
# Weights that share a scale, the most first.
GROUPS = (128, 64, 32)
_COLUMNS = {
    "model": "{model}",
    "recipe": "{recipe}",
    "group": "{group}",
    "MB": "{megabytes:.0f}",
    "KL": "{kl:.4f} [{low:.4f}, {high:.4f}]",
    "same token": "{same_token:.1%}",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for every model, and what the figures say nothing about."""
    made = parser(__doc__, writes=True)
    made.add_argument("slim", type=Path, help="an export in safetensors")
    made.add_argument("--model", default="demo", help="directory or demo: what it was made from")
    made.add_argument("--scenario", required=True, help="scenario file that it was made for")
    made.add_argument(
        "--recipe", choices=RECIPES, action="append", help="repeatable; default: all of them"
    )
    options = made.parse_args(arguments)
    session = open_session(options.model)
    plan = read_plan(options.slim / "plan.json")
    answers = Answers.of(session, read_scenario(options.scenario))
    slim = {"model": "slim", "recipe": "none", "megabytes": _megabytes(options.slim)}
    rows = [slim | answers.judged(load_slim(options.slim, dtype=session.dtype))]
    with scratch(options) as place:
        for recipe in options.recipe or RECIPES:
            for model, source in (("dense", session.source.path), ("slim", options.slim)):
                target = place / f"{model}-{recipe}"
                row = {"model": model, **quantise(source, target, recipe)}
                gc.collect()
                quantised = AutoModelForCausalLM.from_pretrained(target, dtype=session.dtype)
                row |= {"megabytes": _megabytes(target), **answers.judged(quantised)}
                rows.append(row)
                print(table(_COLUMNS, [row]).splitlines()[-1], flush=True)
    bits = quantised_bits(session.source)
    document = {
        "machine": machine("llmcompressor", "compressed-tensors"),
        "model": options.model,
        "scenario": Path(options.scenario).stem,
        "budget": plan.budget,
        "bits_before": bits,
        "rows": rows,
    }
    lines = [f"KL to the dense model, in nats, on {rows[0]['tokens']} tokens of its answers"]
    if bits:
        lines.append(
            f"The dense model's weights had {bits} bits before they were dequantised, so what "
            f"{bits} bits cost here says nothing of {bits} bits in other models."
        )
    finish(options, document, "", *lines, table(_COLUMNS, rows))


def quantise(source: Path, target: Path, recipe: str) -> dict[str, Any]:
    """Write the model of a directory, quantised by a recipe, to another one; the recipe, and the
    group of weights where there is one.

    Raises UsageError where no group divides all rows.
    """
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    row: dict[str, Any] = {"recipe": recipe}
    scheme: dict[str, Any]
    if recipe == "int4":
        row["group"] = group_size(model)
        scheme = {"weights": {"num_bits": 4, "strategy": "group", "group_size": row["group"]}}
    else:
        bits = int(recipe.removeprefix("int"))
        scheme = {
            "weights": {"num_bits": bits, "strategy": "channel"},
            "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
        }
    groups = {recipe: {"targets": ["Linear"], **scheme}}
    oneshot(model=model, recipe=QuantizationModifier(config_groups=groups, ignore=["lm_head"]))
    model.save_pretrained(target)
    if recipe == "int7":
        _name_eight_bits(target / "config.json")
    return row


def group_size(model: nn.Module) -> int:
    """The largest group of weights that divides the rows of every projection of a model."""
    rows = {
        module.in_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    for size in GROUPS:
        if not any(row % size for row in rows):
            return size
    raise UsageError(
        f"rows have {min(rows)} to {max(rows)} weights, and not all are multiples of {GROUPS[-1]}: "
        f"plan with --width-multiple {GROUPS[-1]}."
    )


def _name_eight_bits(config: Path) -> None:
    """Tell readers of 7 bits that they are 8, in which they are stored."""
    content = json.loads(config.read_text(encoding="utf-8"))
    for group in content["quantization_config"]["config_groups"].values():
        group["weights"]["num_bits"] = 8
    config.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _megabytes(directory: Path) -> float:
    return round(sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e6, 1)


if __name__ == "__main__":
    main()
