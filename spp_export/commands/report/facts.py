"""What the page shows, read from the files: the plan's decisions and the measurements."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spp_export.commands.report.bench import Benchmark, benchmark_part
from spp_export.commands.report.charts import quality_charts
from spp_export.commands.report.files import Place, mapping, number, objects, pairs, text
from spp_export.commands.report.heads import STATES, Heads, heads_of, matching_artifacts
from spp_export.commands.report.page.figures import figure, integer, percent, times
from spp_export.common.errors import ModelError, SppError
from spp_export.common.json_files import read_json
from spp_export.common.versions import spp_version
from spp_export.data.artifacts import bundled_artifacts, read_artifacts
from spp_export.evaluation.remarks import remarks
from spp_export.formats.registry import FORMATS
from spp_export.models.engines import Engine
from spp_export.models.hub import model_options
from spp_export.models.shape import LayerShape
from spp_export.planning import Plan

VERIFY = "verify.json"
# Channels of an MLP where none is recorded: a number that any number of cards divides.
_SOME_WIDTH = 64
_SIZES = {
    "parameters": "Parameters",
    "file_bytes": "Bytes of weights",
    "kv_bytes_per_token": "KV cache per token",
}


def report_parts(
    place: Place, *, bench: Path | None, evaluation: Path | None, artifacts: str | None
) -> dict[str, Any]:
    """Everything that the templates show, by name. Errors are those of the files that were named.

    A part that is None has no section. Where it is a hint, {"hint": why there is nothing to show,
    "command": what would change that}.
    """
    plan = place.plan
    heads = heads_of(plan, place.config, matching_artifacts(plan, artifacts))
    verdict, why = read_verdict(place.directory) if place.directory else (None, "")
    checks: dict[str, Any] | None = None
    if verdict:
        checks = checks_part(verdict, FORMATS[place.kind].reference)
    elif place.directory:
        command = _commands(("verify", place.name, *_model(place)))
        checks = {"hint": f"{why} Check it against its dense model:", "command": command}
    ratio = number(mapping((verdict or {}).get("quality")).get("ratio"))
    benchmark = benchmark_part(bench, place.plan_hash) if bench else _unmeasured(place)
    return {
        "title": place.name,
        "kind": f"{_title(place.kind)} {plan.model_source}",
        "plan": plan,
        "quantised": place.quantised,
        "scenario": text(plan.scenario.get("name")),
        "criterion": text(plan.criterion.get("name")),
        "version": spp_version(),
        "saved": _saved(plan),
        "sizes": {name: sizes for name in _SIZES if (sizes := _sizes(plan, name))},
        "size_names": _SIZES,
        "ratio": ratio,
        "decode": benchmark.decode_of(place.name) if isinstance(benchmark, Benchmark) else None,
        "mixture": mixture_part(plan),
        "bounds": _bounds(plan),
        "weight_bytes": place.weight_bytes,
        "heads": heads,
        "told": [f"{remark[:1].upper()}{remark[1:]}." for remark in plan.remarks],
        "states": STATES,
        "channels": channels_part(heads, plan),
        "checks": checks,
        "quality": _quality(place, verdict, evaluation),
        "benchmark": benchmark,
        "engines": [(e.name, e.loads, e.how) for e in _engines(place, heads)],
        "provenance": _provenance(place),
        "versions": {name: text(value) for name, value in plan.versions.items() if text(value)},
        "files": place.files,
    }


def _sizes(plan: Plan, name: str) -> tuple[float, float] | None:
    """Dense and slim, as the plan predicts them."""
    sizes = mapping(plan.predicted.get(name))
    dense, slim = number(sizes.get("dense")), number(sizes.get("slim"))
    return None if not dense or slim is None or dense < 0 or slim < 0 else (dense, slim)


def _saved(plan: Plan) -> list[str]:
    """What the plan takes off the model's sizes."""
    names = (("parameters", "parameters"), ("kv_bytes_per_token", "KV cache"))
    known = [(what, *sizes) for name, what in names if (sizes := _sizes(plan, name))]
    return [
        f"{percent(1 - slim / dense)} off its {what}" for what, dense, slim in known if slim < dense
    ]


def mixture_part(plan: Plan) -> dict[str, Any]:
    """Domains of the scenario with their shares, largest first, and what follows from them."""
    known = {d: number(share) for d, share in mapping(plan.diagnosis.get("mixture")).items()}
    shares = {domain: share for domain, share in known.items() if share is not None}
    shares = {domain: share for domain, share in shares.items() if 0 <= share <= 1}
    if not shares:
        hint = "The plan names no diagnosis: it was not made from a scenario's text."
        return {"hint": hint, "command": ""}
    words = []
    if regime := text(plan.diagnosis.get("regime")):
        words.append(f"regime {regime}")
    breadth, prompts = (number(plan.diagnosis.get(name)) for name in ("breadth", "prompts"))
    if breadth is not None:
        words.append(f"breadth {figure(breadth, 2)} (0 one domain, 1 all alike)")
    if prompts is not None:
        words.append(f"diagnosed from {integer(prompts)} prompts")
    sentence = ", ".join(words)
    return {
        "shares": sorted(shares.items(), key=lambda item: -item[1]),
        "note": f"{sentence[:1].upper()}{sentence[1:]}." if sentence else "",
    }


def channels_part(heads: Heads, plan: Plan) -> dict[str, Any] | None:
    """Channels kept per layer, of its MLP or by every expert of it, None where a layer keeps all
    and the number is not recorded; the part is None where no layer loses a channel."""
    inside = any(layer.expert_channels is not None for layer in heads.layers)
    if not inside and all(layer.channels is None for layer in heads.layers):
        return None
    kept = [_channels_kept(heads, plan, index, inside) for index in range(len(heads.layers))]
    mixed = any(of_experts for *_, of_experts in kept) and not all(of for *_, of in kept)
    counts, wholes, _ = zip(*kept, strict=True)
    known = [count for count in counts if count is not None]
    of_mlps = [count for count, _, of_experts in kept if not of_experts]
    total = None if inside or None in of_mlps else sum(count or 0 for count in of_mlps)
    whole = None if inside or not heads.channels else heads.channels * len(of_mlps)
    note = "Channels of every expert: each keeps its own, as many as the others of its layer."
    if not inside and (whole is None or total is None):
        note = "How many MLP channels the dense model has is not recorded in these files."
    elif total is not None and whole is not None:
        note = f"{integer(total)} of {integer(whole)} MLP channels stay."
    amounts = ["all" if count is None else integer(count) for count in counts]
    titles = [_channels_title(*of_layer) for of_layer in kept]
    bars: list[float | None] = list(counts)
    if mixed:  # of different wholes
        bars = [100 * n / of if n is not None and of else None for n, of, _ in kept]
    what = "Percent of the channels of MLPs and experts" if mixed else "MLP channels"
    return {
        "kept": bars,
        "what": "Channels of every expert" if inside and not mixed else what,
        "total": total,
        "whole": whole,
        "most": 100 if mixed else wholes[0] or max(known),
        "note": note,
        "titles": [f"Layer {i}\n{amounts[i]}{title}" for i, title in enumerate(titles)],
        "rows": [
            (i, amount, integer(dense) if dense else "not recorded")
            for i, (amount, dense) in enumerate(zip(amounts, wholes, strict=True))
        ],
    }


def _channels_kept(
    heads: Heads, plan: Plan, index: int, inside: bool
) -> tuple[int | None, int | None, bool]:
    """How many channels a layer keeps, of how many, as far as that is recorded, and whether they
    are of each of its experts; `inside`: whether experts of any layer lose some."""
    layer, listed = heads.layers[index], plan.family.get("with_experts")
    if index in listed if isinstance(listed, list) else inside:
        recorded: Any = plan.family.get("expert_channels")
        widest = max(x.expert_width or 0 for x in heads.layers)
        dense = recorded if type(recorded) is int and recorded >= widest > 0 else None
        return dense if layer.expert_width is None else layer.expert_width, dense, True
    count = heads.channels if layer.channels is None else len(layer.channels)
    return count, heads.channels, False


def _channels_title(count: int | None, whole: int | None, of_experts: bool) -> str:
    if of_experts:
        return f"{f' of {integer(whole)}' if whole else ''} channels of every expert"
    if not whole or count is None:
        return " channels"
    return f" of {integer(whole)} channels, {percent(count / whole)}"


def _bounds(plan: Plan) -> list[tuple[str, str]]:
    """Best possible decode speed-ups, and what a table of latency predicts."""
    rows = []
    for case in objects(plan.predicted.get("decode_bound")):
        batch, context, most = (number(case.get(key)) for key in ("batch", "context", "speedup"))
        if batch is not None and context is not None and most is not None:
            at = f"batch {integer(batch)}, context {integer(context)}"
            rows.append((f"Decode at most, {at}", times(most, 4)))
    measured = mapping(plan.predicted.get("latency"))
    speedup = number(measured.get("speedup"))
    if speedup is not None:
        phase = text(measured.get("phase")).capitalize()
        rows.append((f"{phase} by the table of latency", times(speedup, 4)))
    return rows


def _quality(
    place: Place, verdict: Mapping[str, Any] | None, evaluation: Path | None
) -> dict[str, Any] | None:
    facts = quality_facts(verdict) if verdict else []
    if evaluation:
        charts, more, note = quality_charts(evaluation, place.plan)
        return {"facts": facts, "charts": charts, "more": more, "note": note}
    if place.directory is None:
        return None
    keeps = ("--keep", "0.9", "--keep", "0.8", "--keep", "0.7")
    command = _commands(
        ("eval", "--scenario", "FILE", *_model(place), *keeps, "-o", "results"),
        ("report", place.name, "--eval", "results"),
    )
    hint = (
        "Curves over budgets come from an evaluation:"
        if facts
        else "This export's checks hold no figure of quality. An evaluation adds curves:"
    )
    return {"facts": facts, "charts": [], "more": [], "note": "", "hint": hint, "command": command}


def _unmeasured(place: Place) -> dict[str, Any] | None:
    if place.directory is None:
        return None
    contexts = ("--context", "128", "--context", "1024")
    command = _commands(
        ("bench", place.name, *_model(place), *contexts, "-o", "bench.json"),
        ("report", place.name, "--bench", "bench.json"),
    )
    hint = "Nothing has been measured for this page. Measure it beside the dense model:"
    return {"hint": hint, "command": command}


def _model(place: Place) -> tuple[str, ...]:
    """The option that names the dense model, unless it is the default one."""
    default = read_artifacts(bundled_artifacts()).fingerprint
    known = place.plan.model_fingerprint == default
    return () if known else model_options(place.plan.model_source)


def _commands(*lines: Sequence[str]) -> str:
    """Shell commands, with every name quoted."""
    return "\n".join(shlex.join(("spp", *words)) for words in lines)


def _title(kind: str) -> str:
    """What a page is about, up to the model's name."""
    if kind == "plan":
        return "Plan for"
    return f"Slim {FORMATS[kind].kind.removeprefix('slim ')} of"


def _engines(place: Place, heads: Heads) -> Sequence[Engine]:
    plan = place.plan
    layers = [
        LayerShape(
            len(layer.query_heads),
            len(layer.kv_heads),
            (heads.channels or _SOME_WIDTH) if layer.channels is None else len(layer.channels),
            # Engines ask whether any go; how many the dense model has is not recorded.
            dropped_experts=int(layer.experts is not None),
            dropped_channels=int(layer.expert_channels is not None),
        )
        for layer in plan.layers
    ]
    made = FORMATS.get(place.kind, FORMATS["safetensors"])
    return made.engines_for(place.config, plan.written_layout, layers)


def _provenance(place: Place) -> dict[str, str]:
    """Facts by name; those whose name has SHA-256 or fingerprint in it are set in a fixed width."""
    plan = place.plan
    facts = {
        "Model": plan.model_source,
        "Model fingerprint": plan.model_fingerprint,
        "Plan, SHA-256": place.plan_hash,
        "Scenario": text(plan.scenario.get("name")),
        "Scenario, SHA-256": text(plan.scenario.get("sha256")),
        "Scenario's text": _text_read(plan),
        "Artifacts, SHA-256": text(plan.artifacts.get("sha256")),
        "Layout": f"{plan.layout}, padded" if plan.padded else plan.layout,
        "Criterion": pairs(plan.criterion).removeprefix("name "),
        "Policy": pairs(plan.policy).removeprefix("name "),
        "Compensation": plan.compensation,
        "Calibration": pairs(plan.calibration),
        "Budget asked": pairs(plan.budget.get("asked")),
        "Budget realised": _realised(plan),
    }
    return {name: value for name, value in facts.items() if value}


def _text_read(plan: Plan) -> str:
    """How much of the scenario was calibrated on."""
    tokens = mapping(mapping(plan.scenario.get("tokens")).get("calibration"))
    read, there = number(tokens.get("read")), number(tokens.get("of"))
    if read is None or there is None:
        return ""
    return f"{integer(read)} of {integer(there)} tokens to calibrate on"


def _realised(plan: Plan) -> str:
    """What the plan comes to, in the unit of its budget."""
    realised = mapping(plan.budget.get("realised"))
    keep, cost, limit = (number(realised.get(key)) for key in ("keep", "cost", "limit"))
    words = [] if keep is None else [f"keep {figure(keep, 4)}"]
    if cost is not None and limit is not None:
        kind = text(realised.get("kind"))
        words.append(f"{integer(cost)} of at most {integer(limit)} {kind}".rstrip())
    return ", ".join(words) or pairs(realised)


def read_verdict(directory: Path) -> tuple[Mapping[str, Any] | None, str]:
    """The report of checks in a directory, or None and why there is none to show."""
    if not (directory / VERIFY).is_file():
        return None, "This export was not verified when it was written."
    try:
        verdict = read_json(directory / VERIFY, what="report", error=ModelError)
    except SppError as error:
        return None, str(error)
    if not isinstance(verdict, dict) or not isinstance(verdict.get("passed"), bool):
        return None, f"{VERIFY} is no report of checks."
    return verdict, ""


def checks_part(verdict: Mapping[str, Any], reference: str) -> dict[str, Any]:
    """Every check of verify.json. The report has passed where all of them have.

    reference: what the export was compared with.
    """
    rows = [
        {
            "name": text(check.get("name")),
            "passed": check.get("passed") is True,
            "found": number(check.get("found")),
            "limit": number(check.get("limit")),
            "detail": text(check.get("detail")),
        }
        for check in objects(verdict.get("checks"))
    ]
    precise, dtype = text(verdict.get("reference")), text(verdict.get("computed_in"))
    note = f"The reference is {reference}."
    if precise and dtype:
        note = (
            f"The reference is {reference}, in {precise}; the export computed in {dtype}. A limit "
            "is what the masked model itself loses to rounding, and a little more."
        )
    passed = verdict["passed"] and all(row["passed"] for row in rows)
    return {"passed": passed, "rows": rows, "note": note}


def quality_facts(verdict: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Figures on text that the plan has not seen, and what quantising cost."""
    measured = mapping(verdict.get("quality"))
    names = ("ratio", "dense_perplexity", "slim_perplexity")
    ratio, dense, slim = (number(measured.get(name)) for name in names)
    facts = []
    if ratio is not None:
        beside = ""
        if dense is not None and slim is not None:
            beside = f" ({figure(slim, 4)} / {figure(dense, 4)})"
        interval = _interval(measured, "ratio", lambda end: times(end, 4))
        facts.append(("Perplexity over dense", f"{times(ratio, 4)}{interval}{beside}"))
    facts += _distances(measured, "dense")
    facts += _measured_on(measured)
    quantised = mapping(verdict.get("quantisation"))
    return facts + _distances(quantised, "unquantised") + _measured_on(quantised)


def _measured_on(measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How much text of what kind, and what to think of that."""
    texts, tokens = number(measured.get("texts")), number(measured.get("tokens"))
    if texts is None or tokens is None:
        return []
    source = text(measured.get("source")) or "held-out text of the scenario"
    words = f"{integer(tokens)} tokens in {integer(texts)} texts: {source}"
    return [("Measured on", "; ".join([words, *remarks(tokens, number(measured.get("mean_kl")))]))]


def _interval(measured: Mapping[str, Any], name: str, form: Callable[[float], str]) -> str:
    """The 95 % interval of a figure, in brackets."""
    ends = mapping(measured.get("intervals")).get(name)
    known = [number(end) for end in ends] if isinstance(ends, list) and len(ends) == 2 else []
    shown = [form(end) for end in known if end is not None]
    return f" [{', '.join(shown)}]" if len(shown) == 2 else ""


def _distances(measured: Mapping[str, Any], other: str) -> list[tuple[str, str]]:
    kl, top1 = number(measured.get("mean_kl")), number(measured.get("top1"))
    facts = []
    if kl is not None:
        interval = _interval(measured, "mean_kl", figure)
        facts.append((f"Mean KL to {other}", f"{figure(kl)}{interval} nats per token"))
    if top1 is not None:
        interval = _interval(measured, "top1", percent)
        facts.append((f"Same first token as {other}", f"{percent(top1)}{interval}"))
    return facts
