"""The model card that travels with an export: what it is, where from, how it was checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import TYPE_CHECKING, Any

from spp_export.evaluation.remarks import remarks
from spp_export.models.engines import Engine
from spp_export.models.hub import hub_id
from spp_export.models.shape import ModelShape
from spp_export.planning import Plan
from spp_export.planning.bound import Predicted

if TYPE_CHECKING:
    from jinja2 import Template

# What Markdown, GitHub's kind of it included, gives a meaning to within a line.
_MARKUP = re.compile(r"[\\`*_\[\]<>|#&~$@!{}]|:(?=//)|(?<=www)\.")
_SHA256 = re.compile("[0-9a-f]{64}")
# Of what a budget came to, the figures that say something without the code.
_REALISED = ("keep", "parameters", "kv_bytes_per_token")
_MASKED = "the dense model with the same units masked"
_SAME_WEIGHTS = "the PyTorch model of the same weights"

_LAYERS = """
The {count} layers that were cut learnt, each by itself, to write what the dense model's do, in \
{layer_rounds} rounds over {what} {texts} texts of {name}{pools}: how far their streams are from \
the dense model's, relative to what a layer writes, went from {before} to {after} on text apart.
"""
_STEPS = """
The slim model was then trained for {taken} steps of {batch_size} texts {how}, learning rate \
{learning_rate:g}, on {what} {texts} texts of {name}; it is as it was after step {best}. Its loss \
on them went from {first} to {last} nats per token.
"""


_TRAINED = {
    "adapters": "with LoRA (rank {rank}, alpha {alpha}) that is merged into its weights",
    "weights": "in the projections of the layers that were cut",
}
_LEARNT = {"answers": "what the dense model answers to the", "text": "the"}


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
    sees = bool(shape.beside)
    metadata = _metadata(plan.model_source, "transformers", ["pruned", "spp"], license_name, sees)
    parts = _plan_parts(plan, shape, sizes) | {"sees": sees}
    return _render(name, metadata, checks, _MASKED, engines, **parts)


def recovery_section(checks: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The card's section on further training of a slim checkpoint; `record` is recovery.json."""
    data = {**record["data"], "name": _escaped(str(record["data"]["name"]))}
    settings = record["settings"]
    how, what = _TRAINED[settings["train"]].format_map(settings), _LEARNT[settings["learn"]]
    facts = {**settings, **record["steps"], **data, "how": how, "what": what}
    section = "## Recovered\n"
    if layers := record.get("layers"):
        pools = " and on the artifacts' texts" if layers["pools"] else ""
        section += _LAYERS.format_map({**facts, **layers, "pools": pools})
    if loss := record.get("loss"):
        section += _STEPS.format_map({**facts, **loss})
    quality, before = checks.get("quality"), record.get("before")
    if quality and before:
        section += (
            f"\nOn {quality['source']}: mean KL to the dense model {quality['mean_kl']}, before "
            f"{before['mean_kl']}; perplexity {quality['slim_perplexity']}, before "
            f"{before['slim_perplexity']}, dense {quality['dense_perplexity']}.\n"
        )
    return section


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
    form = "an ONNX graph, with its weights in `model.onnx_data`"
    parts = _converted("onnx", form, base_model, license_name, slim, converted)
    return _render(name, checks=checks, engines=engines, attention=attention, **parts)


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
    words = "a GGUF file, `model.gguf`"
    parts = _converted("gguf", words, base_model, license_name, slim, converted)
    return _render(name, checks=checks, engines=engines, stored=form, **parts)


def _render(
    name: str,
    metadata: str,
    checks: Mapping[str, Any] | None,
    reference: str,
    engines: Sequence[Engine],
    **parts: Any,
) -> str:
    """The card; a format's own parts are `form`, `base_model`, `stored` and `attention`."""
    unused = dict.fromkeys(("plan", "sizes", "form", "stored", "attention", "sees"))
    return _template().render(
        unused | parts,
        name=name,
        directory=json.dumps(name),
        metadata=metadata,
        checks=checks,
        measured=_measured(checks or {}),
        reference=reference,
        engines=engines,
    )


def _measured(checks: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What was measured on text, by what it was compared with."""
    names = {"quality": "Beside the dense model", "quantisation": "Beside the unquantised model"}
    return [(words, checks[name]) for name, words in names.items() if checks.get(name)]


def _ends(quality: Mapping[str, Any], name: str) -> str:
    """A figure's interval in brackets."""
    low_high = quality.get("intervals", {}).get(name)
    return f" [{low_high[0]}, {low_high[1]}]" if low_high else ""


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    # The text is Markdown: what escapes HTML would not do, and every value is escaped all the same.
    environment = Environment(
        finalize=lambda value: _escaped(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = files("spp_export.formats").joinpath("card.md.j2").read_text(encoding="utf-8")
    environment.globals |= {"remarks": remarks, "ends": _ends}
    return environment.from_string(text)


def _metadata(
    base_model: str,
    library: str,
    tags: Sequence[str],
    license_name: str | None,
    sees: bool = False,
) -> str:
    """The YAML that model hubs read."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=hub_id(base_model),
        library_name=library,
        license=_printable(license_name) if license_name else None,
        pipeline_tag="image-text-to-text" if sees else "text-generation",
        tags=list(tags),
    )
    return data.to_yaml()


def _converted(
    tag: str,
    form: str,
    base_model: str,
    license_name: str | None,
    slim: tuple[Plan, ModelShape, Predicted] | None,
    converted: Plan | None,
) -> dict[str, Any]:
    """What the cards of other formats have in common; `form` says what the format is."""
    tags = [tag, "pruned", "spp"] if slim or converted else [tag, "spp"]
    parts = {
        "metadata": _metadata(base_model, tag, tags, license_name),
        "reference": _SAME_WEIGHTS,
        "form": form,
        "base_model": base_model,
    }
    if slim:
        return parts | _plan_parts(*slim)
    return parts | (_plan_parts(converted) if converted else {})


def _plan_parts(
    plan: Plan, shape: ModelShape | None = None, predicted: Predicted | None = None
) -> dict[str, Any]:
    """What the plan keeps and its budget; a plan may be written by hand, so its provenance may be
    absent or hold anything.
    """
    scenario, mixture = plan.scenario.get("name"), plan.diagnosis.get("mixture")
    shares = mixture.items() if isinstance(mixture, Mapping) else ()
    known = [(d, v) for d, v in shares if type(v) in (int, float) and 0.01 <= v <= 1]
    counts = {
        "query heads": [len(layer.query_heads) for layer in plan.layers],
        "KV heads": [len(layer.kv_heads) for layer in plan.layers],
        "MLP channels": [len(x.channels) for x in plan.layers if x.channels is not None],
        "experts, of layers that lose some": [
            len(x.experts) for x in plan.layers if x.experts is not None
        ],
        "channels of every expert, of layers that lose some": [
            x.expert_width for x in plan.layers if x.expert_width is not None
        ],
    }
    realised = _numbers(plan.budget.get("realised"))
    hashes = {"Scenario": plan.scenario.get("sha256"), "Artifacts": plan.artifacts.get("sha256")}
    parts = {
        "plan": plan,
        "scenario": str(scenario) if scenario else "",
        "cut": "parts",
        "told": [f"{remark[:1].upper()}{remark[1:]}." for remark in plan.remarks],
        "domains": [f"{d} {v:.0%}" for d, v in sorted(known, key=lambda item: -item[1])],
        "kept": [(name, _runs(of_layers)) for name, of_layers in counts.items() if of_layers],
        "asked": _listed(_numbers(plan.budget.get("asked"))),
        "realised": _listed({name: realised[name] for name in _REALISED if name in realised}),
        "hashes": [
            (what, sha256)
            for what, sha256 in hashes.items()
            if isinstance(sha256, str) and _SHA256.fullmatch(sha256)
        ],
    }
    if shape and predicted:
        parts |= _size_parts(plan, shape, predicted)
    return parts


def _size_parts(plan: Plan, shape: ModelShape, predicted: Predicted) -> dict[str, Any]:
    layers = plan.layer_shapes(shape)
    heads = sum(layer.query_heads for layer in layers)
    channels = sum(layer.channels for layer in layers)
    experts, whole_experts = (sum(shape.experts_in(of)) for of in (layers, shape.layers))
    whole_heads = sum(layer.query_heads for layer in shape.layers)
    whole_channels = sum(layer.channels for layer in shape.layers)
    rows = [
        ("parameters", predicted.dense_parameters, predicted.parameters),
        ("KV cache, bytes per token", predicted.dense_kv_bytes, predicted.kv_bytes),
        ("query heads", whole_heads, heads),
    ]
    if whole_experts:
        rows.append(("experts", whole_experts, experts))
    if channels < whole_channels or not whole_experts:
        rows.append(("MLP channels", whole_channels, channels))
    if any(layer.dropped_channels for layer in layers):
        whole, inside = map(shape.expert_channels_in, (shape.layers, layers))
        rows.append(("channels of experts", whole, inside))
    written = sum(layer.query_heads for layer in plan.written_shapes(shape))
    cut = {
        "attention heads": heads < whole_heads,
        "MLP channels": channels < whole_channels,
        "experts": experts < whole_experts,
        "channels of experts": any(layer.dropped_channels for layer in layers),
    }
    return {
        "cut": " and ".join(name for name, is_cut in cut.items() if is_cut) or "parts",
        "sizes": [(name, f"{dense:,}", f"{slim:,}") for name, dense, slim in rows],
        "padding": f"{written - heads:,}" if plan.padded else "",
    }


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
        f"{name.replace('_', ' ')} {value:{',' if type(value) is int else '.4g'}}"
        for name, value in figures.items()
    )


def _escaped(text: str) -> str:
    """Untrusted text as plain words within a line of Markdown: no markup, no line breaks."""
    return _MARKUP.sub(r"\\\g<0>", _printable(text))


def _printable(text: str) -> str:
    """Untrusted text in one line, with marks for control characters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
