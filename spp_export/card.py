"""The model card that travels with an export: what it is, where from, how it was checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spp_export.bound import Predicted
from spp_export.engines import Engine
from spp_export.plans import Plan
from spp_export.shape import ModelShape


def model_card(
    name: str,
    plan: Plan,
    shape: ModelShape,
    sizes: Predicted,
    checks: Mapping[str, Any] | None,
    engines: Sequence[Engine],
    license_name: str | None,
) -> str:
    """README.md of a slim checkpoint, with the metadata that model hubs read."""
    front = {"base_model": plan.model_source, "library_name": "transformers"}
    if license_name:
        front["license"] = license_name
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items())]
    lines += ["pipeline_tag: text-generation", 'tags: ["pruned", "spp"]', "---", ""]
    lines += [f"# {_escaped(name)}", "", *_origin(plan, shape), ""]
    lines += [*_sizes(plan, shape, sizes), "", *_checks(checks), "", *_loading(plan, engines)]
    return "\n".join(lines) + "\n"


def _origin(plan: Plan, shape: ModelShape) -> list[str]:
    scenario = plan.scenario.get("name")
    text = f"A slim version of {_escaped(plan.model_source)} made by spp"
    if scenario:
        text += f" for the scenario {_escaped(str(scenario))}"
    cut = _cut(plan, shape)
    lines = [f"{text}: {cut} that it does not need are cut out of the weights."]
    mixture = plan.diagnosis.get("mixture")
    if isinstance(mixture, Mapping):
        # A plan may be written by hand, and what it says of its origin is not checked.
        known = [(d, v) for d, v in mixture.items() if type(v) in (int, float) and 0.01 <= v <= 1]
        shown = (f"{_escaped(d)} {v:.0%}" for d, v in sorted(known, key=lambda item: -item[1]))
        lines += ["", f"Domains of the scenario: {', '.join(shown)}."] if known else []
    return lines


def _cut(plan: Plan, shape: ModelShape) -> str:
    layers = plan.layer_shapes(shape)
    kinds = {
        "attention heads": any(layer.query_heads < shape.query_heads for layer in layers),
        "MLP channels": any(layer.channels < shape.channels for layer in layers),
    }
    return " and ".join(name for name, cut in kinds.items() if cut) or "parts"


def _sizes(plan: Plan, shape: ModelShape, sizes: Predicted) -> list[str]:
    layers = plan.layer_shapes(shape)
    heads = sum(layer.query_heads for layer in layers)
    channels = sum(layer.channels for layer in layers)
    rows = [
        ("parameters", sizes.dense_parameters, sizes.parameters),
        ("KV cache, bytes per token", sizes.dense_kv_bytes, sizes.kv_bytes),
        ("query heads", shape.query_heads * shape.num_layers, heads),
        ("MLP channels", shape.channels * shape.num_layers, channels),
    ]
    table = ["| | dense | slim |", "|---|---|---|"]
    table += [f"| {name} | {dense:,} | {slim:,} |" for name, dense, slim in rows]
    return [*table, "", f"Layout `{plan.layout}`, compensation `{plan.compensation}`."]


def _checks(report: Mapping[str, Any] | None) -> list[str]:
    if report is None:
        return ["Not verified (`--no-verify`)."]
    lines = ["Checked against the dense model with the same units masked:", ""]
    for check in report["checks"]:
        mark = "passed" if check["passed"] else "FAILED"
        lines.append(f"- {check['name']}: {mark}. {_escaped(check.get('detail', ''))}".rstrip())
    quality = report.get("quality")
    if quality:
        lines += [
            "",
            f"On {quality['tokens']} held-out tokens of the scenario: perplexity "
            f"{quality['slim_perplexity']} against {quality['dense_perplexity']} dense "
            f"({quality['ratio']}x), mean KL {quality['mean_kl']} nats.",
        ]
    return lines


def _loading(plan: Plan, engines: Sequence[Engine]) -> list[str]:
    remote = ", trust_remote_code=True" if plan.layout == "per-layer" else ""
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("."{remote})',
        f'tokenizer = AutoTokenizer.from_pretrained("."{remote})',
        "```",
        "",
        "| engine | loads it | how |",
        "|---|---|---|",
    ]
    lines += [f"| {e.name} | {e.loads} | {e.how} |" for e in engines]
    return lines


def _escaped(text: str) -> str:
    """Text from outside as plain words of Markdown: no markup, no line breaks."""
    flat = " ".join(text.split())
    return "".join("\\" + c if c in "\\`*_[]<>|#" else c for c in flat)
