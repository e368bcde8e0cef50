"""The model card that travels with an export: what it is, where from, how it was checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from spp_export.models.engines import Engine
from spp_export.models.shape import ModelShape
from spp_export.planning import Plan
from spp_export.planning.bound import Predicted

# What Markdown, GitHub's kind of it included, gives a meaning to within a line.
_MARKUP = re.compile(r"[\\`*_\[\]<>|#&~$@!{}]|:(?=//)|(?<=www)\.")
_SHA256 = re.compile("[0-9a-f]{64}")
# Of what a budget came to, the figures that say something without the code.
_REALISED = ("keep", "parameters", "kv_bytes_per_token")
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


def recovery_section(checks: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """What the card of a slim checkpoint that was trained further says of that; `record` is
    recovery.json."""
    settings, data, loss = record["settings"], record["data"], record["loss"]
    lines = [
        "## Recovered",
        "",
        f"The slim model was then trained for {settings['steps']} steps of "
        f"{settings['batch_size']} texts with LoRA (rank {settings['rank']}, alpha "
        f"{settings['alpha']}, learning rate {settings['learning_rate']:g}) on {data['texts']} "
        f"texts of {_escaped(str(data['name']))}, and the adapters are merged into its weights. "
        "Its loss on them went from "
        f"{loss['first']} to {loss['last']} nats per token.",
    ]
    quality, before = checks.get("quality"), record.get("before")
    if quality and before:
        lines += [
            "",
            f"On text that was not trained on: perplexity {quality['slim_perplexity']}, before "
            f"{before['slim_perplexity']}, dense {quality['dense_perplexity']}.",
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
    converted: Plan | None = None,
) -> str:
    """README.md of an ONNX directory.

    `attention` is the form of the graph's attention, `checks` a report like that of `model_card`.
    `slim` is the plan of a slim model, the dense model's sizes and what the plan made of them; None
    is a model that was only converted, `converted` its plan where it was slim before.
    """
    form = ("onnx", "an ONNX graph, with its weights in `model.onnx_data`")
    lines = _converted(name, base_model, form, license_name, slim, converted)
    lines += ["", *_checks(checks, _SAME_WEIGHTS), "", *_padding(attention), ""]
    lines += _running(name, engines)
    return "\n".join(lines) + "\n"


def gguf_card(
    name: str,
    base_model: str,
    form: Mapping[str, Any],
    checks: Mapping[str, Any] | None,
    engines: Sequence[Engine],
    license_name: str | None,
    slim: tuple[Plan, ModelShape, Predicted] | None = None,
    converted: Plan | None = None,
) -> str:
    """README.md of a GGUF directory.

    `form` is what `Contents.summary` says of the file; the others are as of `onnx_card`.
    """
    kind = ("gguf", "a GGUF file, `model.gguf`")
    lines = _converted(name, base_model, kind, license_name, slim, converted)
    lines += ["", *_stored(form), "", *_checks(checks, _SAME_WEIGHTS), ""]
    lines += ["```sh", "spp chat .", "llama-cli -m model.gguf", "```", ""]
    return "\n".join(lines + _engines(engines)) + "\n"


def _converted(
    name: str,
    base_model: str,
    form: tuple[str, str],
    license_name: str | None,
    slim: tuple[Plan, ModelShape, Predicted] | None,
    converted: Plan | None,
) -> list[str]:
    """The card of another format up to its own matters; `form` is its tag and what it is."""
    tag, what = form
    tags = [tag, "pruned", "spp"] if slim or converted else [tag, "spp"]
    lines = [*_front(base_model, tag, tags, license_name), f"# {_escaped(name)}", ""]
    if slim:
        plan, shape, sizes = slim
        lines += [*_origin(plan, shape), "", *_sizes(plan, shape, sizes), ""]
        return [*lines, f"The model is {what}."]
    if converted:
        lines += [*_origin(converted, None), *_decision(converted), ""]
        return [*lines, f"The slim model was converted to {what}."]
    return [*lines, f"The model {_escaped(base_model)} as {what}, made by spp."]


def _stored(form: Mapping[str, Any]) -> list[str]:
    """How the tensors of a GGUF file are stored, and which are not as asked."""
    counted = ", ".join(f"{count} in {kind}" for kind, count in form["tensors"].items())
    lines = [f"Architecture `{form['architecture']}`. Tensors: {counted}."]
    if left := form["not_quantised"]:
        named = ", ".join(f"`{name}`" for name in left[:4])
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        lines += [
            "",
            f"Not quantised, for their rows are no multiple of 32 values: {named}{more}.",
        ]
    return lines


def _front(
    base_model: str, library: str, tags: Sequence[str], license_name: str | None
) -> list[str]:
    """The metadata that model hubs read, up to the first heading."""
    front = {"base_model": base_model, "library_name": library}
    if license_name:
        front["license"] = license_name
    # A JSON string of printable characters is a YAML string; an escaped surrogate would not be.
    quoted = {
        key: json.dumps(_printable(value), ensure_ascii=False) for key, value in front.items()
    }
    lines = ["---", *(f"{key}: {value}" for key, value in quoted.items())]
    return [*lines, "pipeline_tag: text-generation", f"tags: {json.dumps(tags)}", "---", ""]


def _origin(plan: Plan, shape: ModelShape | None) -> list[str]:
    scenario = plan.scenario.get("name")
    text = f"A slim version of {_escaped(plan.model_source)} made by spp"
    if scenario:
        text += f" for the scenario {_escaped(str(scenario))}"
    cut = _cut(plan, shape) if shape else "parts"
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
    return [*table, "", f"{layout}, compensation `{plan.compensation}`.", *_decision(plan)]


def _decision(plan: Plan) -> list[str]:
    """What the plan keeps, layer by layer, and what it was asked for; a plan may be written by
    hand, and of its origin may say nothing, or anything."""
    kept = {
        "query heads": [len(layer.query_heads) for layer in plan.layers],
        "KV heads": [len(layer.kv_heads) for layer in plan.layers],
        "MLP channels": [len(x.channels) for x in plan.layers if x.channels is not None],
    }
    lines = [
        "",
        "Kept by layer, first to last (3 x 9: nine each in three layers):",
        "",
    ]
    lines += [f"- {name}: {_runs(counts)}" for name, counts in kept.items() if counts]
    if asked := _numbers(plan.budget.get("asked")):
        found = _numbers(plan.budget.get("realised"))
        got = {name: found[name] for name in _REALISED if name in found}
        lines += ["", f"Budget asked for: {_listed(asked)}."]
        lines[-1] += f" Realised: {_listed(got)}." if got else ""
    for what, record in (("Scenario", plan.scenario), ("Artifacts", plan.artifacts)):
        sha256 = record.get("sha256")
        if isinstance(sha256, str) and _SHA256.fullmatch(sha256):
            lines += ["", f"{what}: SHA-256 `{sha256}`."]
    return lines


def _runs(counts: Sequence[int]) -> str:
    """Counts of layers in their order: `3 x 9, 6` for three layers of 9 and one of 6."""
    runs = [(count, len(list(group))) for count, group in groupby(counts)]
    return ", ".join(f"{length} x {count}" if length > 1 else f"{count}" for count, length in runs)


def _numbers(record: Any) -> dict[str, float]:
    """The figures of a budget by name, as far as it has any."""
    if not isinstance(record, Mapping):
        return {}
    return {name: value for name, value in record.items() if type(value) in (int, float)}


def _listed(figures: Mapping[str, float]) -> str:
    return ", ".join(
        f"{_escaped(name.replace('_', ' '))} {value:{',' if type(value) is int else '.4g'}}"
        for name, value in figures.items()
    )


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
    """Text from outside as plain words within a line of Markdown: no markup, no line breaks."""
    return _MARKUP.sub(r"\\\g<0>", _printable(text))


def _printable(text: str) -> str:
    """Text from outside in one line, with marks for characters that steer and do not show."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
