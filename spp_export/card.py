"""The model card that travels with an export: what it is, where from, how it was checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spp_export.bound import Predicted
from spp_export.engines import Engine
from spp_export.plans import Plan
from spp_export.shape import ModelShape

_MASKED = "the dense model with the same units masked"
_SAME_WEIGHTS = "the PyTorch model of the same weights"

_GENAI = """\
import onnxruntime_genai as og

model = og.Model(".")
tokenizer, params = og.Tokenizer(model), og.GeneratorParams(model)
params.set_search_options(max_length=64)  # the KV cache is as long, from the beginning
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("The experiment shows"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))""".splitlines()

_JAVASCRIPT = """\
import { env, pipeline } from "@huggingface/transformers";

env.localModelPath = ".."; // above this directory
// dtype names the file, subfolder where it lies
const options = { dtype: "fp32", subfolder: "" };
const generate = await pipeline("text-generation", DIRECTORY, options);
console.log(await generate("The experiment shows", { max_new_tokens: 32 }));""".splitlines()


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
    lines = _front(plan.model_source, "transformers", ["pruned", "spp"], license_name)
    lines += [f"# {_escaped(name)}", "", *_origin(plan, shape), ""]
    lines += [
        *_sizes(plan, shape, sizes),
        "",
        *_checks(checks, _MASKED),
        "",
        *_loading(plan, engines),
    ]
    return "\n".join(lines) + "\n"


def onnx_card(
    name: str,
    base_model: str,
    attention: str,
    checks: Mapping[str, Any] | None,
    engines: Sequence[Engine],
    license_name: str | None,
    slim: tuple[Plan, ModelShape, Predicted] | None = None,
) -> str:
    """README.md of an ONNX directory.

    `attention` is the form of the graph's attention, `checks` a report like that of `model_card`.
    `slim` is the plan of a slim model, the dense model's sizes and what the plan made of them; None
    is a model that was only converted.
    """
    tags = ["onnx", "pruned", "spp"] if slim else ["onnx", "spp"]
    lines = _front(base_model, "onnx", tags, license_name)
    lines += [f"# {_escaped(name)}", ""]
    if slim:
        plan, shape, sizes = slim
        lines += [*_origin(plan, shape), "", *_sizes(plan, shape, sizes), ""]
        lines += ["The model is an ONNX graph, with its weights in `model.onnx_data`."]
    else:
        lines += [f"{_escaped(base_model)} as an ONNX graph, made by spp."]
    lines += ["", *_checks(checks, _SAME_WEIGHTS), "", *_padding(attention), ""]
    lines += _running(name, engines)
    return "\n".join(lines) + "\n"


def _front(
    base_model: str, library: str, tags: Sequence[str], license_name: str | None
) -> list[str]:
    """The metadata that model hubs read, up to the first heading."""
    front = {"base_model": base_model, "library_name": library}
    if license_name:
        front["license"] = license_name
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items())]
    return [*lines, "pipeline_tag: text-generation", f"tags: {json.dumps(tags)}", "---", ""]


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
    layout = f"Layout `{plan.layout}`"
    if plan.padded:
        written = sum(layer.query_heads for layer in plan.written_shapes(shape))
        layout += (
            f", padded: {written - heads:,} more query heads, whose weights are zero, make every "
            "layer regular; the parameters include them"
        )
    return [*table, "", f"{layout}, compensation `{plan.compensation}`."]


def _checks(report: Mapping[str, Any] | None, against: str) -> list[str]:
    if report is None:
        return ["Not verified (`--no-verify`)."]
    lines = [f"Checked against {against}:", ""]
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
    remote = ", trust_remote_code=True" if plan.layout != "uniform" else ""
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("."{remote})',
        f'tokenizer = AutoTokenizer.from_pretrained("."{remote})',
        "```",
        "",
    ]
    return lines + _engines(engines)


def _padding(attention: str) -> list[str]:
    if attention != "gqa":
        return ["Padding: on either side of a batch's texts, told by `attention_mask`."]
    return [
        "Padding: on the right only. The graph counts the ones of `attention_mask` and takes them "
        "to stand first; on the CPU it refuses a batch padded on the left, which is how "
        "transformers.js and optimum generate for several texts. Give these one text at a time, or "
        "write the graph with `--onnx-attention gqa-bias`."
    ]


def _running(name: str, engines: Sequence[Engine]) -> list[str]:
    """How to run an ONNX directory called `name`, from within it."""
    lines = ["```sh", "spp chat .", "```", "", "With onnxruntime-genai:", ""]
    lines += ["```python", *_GENAI, "```", "", "With transformers.js:", ""]
    directory = json.dumps(name)
    lines += ["```js", *(line.replace("DIRECTORY", directory) for line in _JAVASCRIPT), "```", ""]
    return lines + _engines(engines)


def _engines(engines: Sequence[Engine]) -> list[str]:
    lines = ["| engine | loads it | how |", "|---|---|---|"]
    return lines + [f"| {e.name} | {e.loads} | {e.how} |" for e in engines]


def _escaped(text: str) -> str:
    """Text from outside as plain words of Markdown: no markup, no line breaks."""
    flat = " ".join(text.split())
    return "".join("\\" + c if c in "\\`*_[]<>|#" else c for c in flat)
