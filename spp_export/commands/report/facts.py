"""From files to the record that a page is drawn from: what the plan says, and what was measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spp_export.commands.report.bench import benchmark_part, decode_of
from spp_export.commands.report.curves import quality_charts
from spp_export.commands.report.files import Place, mapping, number, objects, pairs, text
from spp_export.commands.report.heads import (
    DenseCounts,
    dense_counts,
    heads_part,
    matching_artifacts,
)
from spp_export.commands.report.page import (
    Benchmark,
    Channels,
    Check,
    Checks,
    Fact,
    Heads,
    Hint,
    Mixture,
    Quality,
    Report,
    Saving,
    Savings,
    Table,
    Tile,
)
from spp_export.commands.report.page.figures import byte_size, change, count, figure, percent, times
from spp_export.common.errors import ModelError, SppError
from spp_export.common.json_files import read_json
from spp_export.common.versions import spp_version
from spp_export.data.artifacts import bundled_artifacts, read_artifacts
from spp_export.formats.onnx.options import ATTENTIONS, PRECISIONS
from spp_export.models.engines import Engine, engines_for, gguf_engines, onnx_engines
from spp_export.models.shape import LayerShape
from spp_export.planning import Plan

_SIZES = {
    "parameters": ("Parameters", False),
    "file_bytes": ("Bytes of weights", True),
    "kv_bytes_per_token": ("KV cache per token", True),
}
_REFERENCES = {
    "safetensors": "the dense model with the same units masked",
    "onnx": "the PyTorch model of the same weights",
    "gguf": "the PyTorch model of the same weights",
}
_FORMATS = {
    "plan": "Plan for",
    "safetensors": "Slim checkpoint of",
    "onnx": "Slim ONNX export of",
    "gguf": "Slim GGUF export of",
}


def report_record(
    place: Place, *, bench: Path | None, evaluation: Path | None, artifacts: str | None
) -> Report:
    """Everything that the page shows. Errors are those of the files that were named."""
    plan = place.plan
    found = matching_artifacts(plan, artifacts)
    counts = dense_counts(plan, place.config, found)
    heads = heads_part(plan, counts, found)
    channels = _channels(plan, counts)
    verdict, why = read_verdict(place.directory) if place.directory else (None, "")
    checks: Checks | Hint | None = (
        checks_part(verdict, _REFERENCES[place.kind]) if verdict else None
    )
    if checks is None and place.directory:
        checks = unverified(why, _commands(("verify", place.name, *_model(place))))
    benchmark = _benchmark(place, bench)
    ratio = _ratio(verdict)
    return Report(
        title=place.name,
        kind=_kind(place),
        summary=_summary(plan, heads, channels, checks, ratio),
        heads=heads,
        savings=_savings(place, heads, channels),
        generator=spp_version(),
        tiles=_tiles(place, heads, checks, verdict, benchmark),
        mixture=_mixture(plan),
        channels=channels,
        checks=checks,
        quality=_quality(place, verdict, evaluation),
        benchmark=benchmark,
        engines=_engines(place, counts),
        provenance=_provenance(place),
        versions={name: text(value) for name, value in plan.versions.items() if text(value)},
        files=place.files,
    )


def _kind(place: Place) -> str:
    quantised = f", {place.quantised}" if place.quantised else ""
    return f"{_FORMATS[place.kind]} {place.plan.model_source}{quantised}"


def _sizes(plan: Plan, name: str) -> tuple[float, float] | None:
    """Dense and slim, as the plan predicts them."""
    found = mapping(plan.predicted.get(name))
    dense, slim = number(found.get("dense")), number(found.get("slim"))
    return None if not dense or slim is None or dense < 0 or slim < 0 else (dense, slim)


def _ratio(verdict: Mapping[str, Any] | None) -> float | None:
    return number(mapping((verdict or {}).get("quality")).get("ratio"))


def _summary(
    plan: Plan,
    heads: Heads,
    channels: Channels | None,
    checks: Checks | Hint | None,
    ratio: float | None,
) -> str:
    """The whole of it in one sentence."""
    scenario = text(plan.scenario.get("name"))
    subject = f"{plan.model_source}, cut for {scenario}" if scenario else plan.model_source
    stays = f"{count(heads.kept)} of {count(heads.query_heads * len(heads.layers))} query heads"
    if channels:
        whole = channels.dense * len(channels.kept)
        stays += f" and {count(sum(channels.kept))} of {count(whole)} MLP channels"
    found = f"{subject}: {stays} stay{_saved(plan)}"
    verdicts = []
    if ratio is not None:
        verdicts.append(f"perplexity on held-out text is {times(ratio)} the dense model's")
    if isinstance(checks, Checks):
        verdicts.append("every check passed" if checks.passed else "a check FAILED")
    return f"{'; '.join([found, ', and '.join(verdicts)])}." if verdicts else f"{found}."


def _saved(plan: Plan) -> str:
    """What that takes off the model's sizes."""
    words = []
    for name, what in (("parameters", "parameters"), ("kv_bytes_per_token", "KV cache")):
        sizes = _sizes(plan, name)
        if sizes and sizes[1] < sizes[0]:
            words.append(f"{percent(1 - sizes[1] / sizes[0])} off its {what}")
    return f", which takes {' and '.join(words)}" if words else ""


def _tiles(
    place: Place,
    heads: Heads,
    checks: Checks | Hint | None,
    verdict: Mapping[str, Any] | None,
    benchmark: Benchmark | Hint | None,
) -> tuple[Tile, ...]:
    plan = place.plan
    whole = heads.query_heads * len(heads.layers)
    tiles = [
        Tile(
            "Query heads kept",
            percent(heads.kept / whole),
            f"{count(heads.kept)} of {count(whole)}",
        )
    ]
    if sizes := _sizes(plan, "parameters"):
        tiles.append(Tile("Parameters", change(*sizes), f"{count(sizes[1])} stay"))
    if sizes := _sizes(plan, "kv_bytes_per_token"):
        note = f"{byte_size(sizes[1])} of {byte_size(sizes[0])} per token"
        tiles.append(Tile("KV cache", change(*sizes), note))
    ratio = _ratio(verdict)
    if ratio is not None:
        tiles.append(Tile("Perplexity", times(ratio), "of dense, on held-out text"))
    decode = decode_of(benchmark, place.name) if isinstance(benchmark, Benchmark) else None
    if decode:
        note = f"of {times(decode.bound)} possible"
        tiles.append(Tile("Decode speed", times(decode.value), note))
    if isinstance(checks, Checks):
        held = sum(check.passed for check in checks.checks)
        value = f"{held} of {len(checks.checks)}"
        tiles.append(Tile("Checks passed", value, "against dense", checks.passed))
    return tuple(tiles)


def _mixture(plan: Plan) -> Mixture | Hint:
    shares = []
    for domain, value in mapping(plan.diagnosis.get("mixture")).items():
        share = number(value)
        if share is not None and 0 <= share <= 1:
            shares.append((domain, share))
    if not shares:
        return Hint("The plan names no diagnosis: it was not made from a scenario's text.")
    shares.sort(key=lambda one: -one[1])
    words = []
    if regime := text(plan.diagnosis.get("regime")):
        words.append(f"Regime {regime}")
    breadth = number(plan.diagnosis.get("breadth"))
    if breadth is not None:
        words.append(f"breadth {figure(breadth, 2)} (0 one domain, 1 all alike)")
    prompts = number(plan.diagnosis.get("prompts"))
    if prompts is not None:
        words.append(f"diagnosed from {count(prompts)} prompts")
    sentence = ", ".join(words)
    notes = (sentence[:1].upper() + sentence[1:] + ".",) if sentence else ()
    return Mixture(tuple(shares), notes)


def _channels(plan: Plan, counts: DenseCounts) -> Channels | None:
    """None where no layer loses a channel."""
    lists = [layer.channels for layer in plan.layers]
    removed = [kept for kept in lists if kept is not None]
    if not removed:
        return None
    least = 1 + max(kept[-1] for kept in removed)
    dense = max(counts.channels or 0, least)
    return Channels(tuple(dense if kept is None else len(kept) for kept in lists), dense)


def _savings(place: Place, heads: Heads, channels: Channels | None) -> Savings | Hint:
    plan, layers = place.plan, len(heads.layers)
    rows = [
        Saving(f"{label}{_unquantised(place, name)}", *sizes, is_bytes)
        for name, (label, is_bytes) in _SIZES.items()
        if (sizes := _sizes(plan, name))
    ]
    rows.append(Saving("Query heads", heads.query_heads * layers, heads.kept))
    rows.append(Saving("KV heads", heads.kv_heads * layers, heads.kept_groups))
    if channels:
        rows.append(Saving("MLP channels", channels.dense * layers, sum(channels.kept)))
    notes = []
    if place.weight_bytes:
        how = f", {place.quantised}" if place.quantised else ""
        notes.append(f"Files of weights in this export: {byte_size(place.weight_bytes)}{how}.")
    return Savings(tuple(rows), _bounds(plan), tuple(notes))


def _unquantised(place: Place, name: str) -> str:
    """What a plan predicts of weights knows nothing of a format that quantises them."""
    return ", unquantised" if place.quantised and name == "file_bytes" else ""


def _bounds(plan: Plan) -> Table | None:
    """Best possible decode speed-ups, and what a table of latency predicts."""
    rows = []
    for case in objects(plan.predicted.get("decode_bound")):
        batch, context, most = (number(case.get(key)) for key in ("batch", "context", "speedup"))
        if batch is not None and context is not None and most is not None:
            name = f"Decode at most, batch {count(batch)}, context {count(context)}"
            rows.append((name, times(most, 4)))
    measured = mapping(plan.predicted.get("latency"))
    speedup = number(measured.get("speedup"))
    if speedup is not None:
        name = f"{text(measured.get('phase')).capitalize()} by the table of latency"
        rows.append((name, times(speedup, 4)))
    return Table(("bound", "speed-up over dense"), tuple(rows)) if rows else None


def _quality(
    place: Place, verdict: Mapping[str, Any] | None, evaluation: Path | None
) -> Quality | Hint | None:
    facts = quality_facts(verdict) if verdict else ()
    charts = quality_charts(evaluation, place.plan) if evaluation else None
    if charts:
        first, more, notes = charts
        return Quality(facts, first, more, notes)
    if place.directory is None:
        return None
    asked = ("eval", "--scenario", "FILE", *_model(place))
    command = _commands(
        (*asked, "--keep", "0.9", "--keep", "0.8", "--keep", "0.7", "-o", "results"),
        ("report", place.name, "--eval", "results"),
    )
    if facts:
        return Quality(facts, hint=Hint("Curves over budgets come from an evaluation:", command))
    return Hint(
        "This export's checks hold no figure of quality. An evaluation adds curves:", command
    )


def _benchmark(place: Place, bench: Path | None) -> Benchmark | Hint | None:
    if bench:
        return benchmark_part(bench, place.plan_hash)
    if place.directory is None:
        return None
    contexts = ("--context", "128", "--context", "1024")
    command = _commands(
        ("bench", place.name, *_model(place), *contexts, "-o", "bench.json"),
        ("report", place.name, "--bench", "bench.json"),
    )
    return Hint(
        "Nothing has been measured for this page. Measure it beside the dense model:", command
    )


def _model(place: Place) -> tuple[str, ...]:
    """The option that names the dense model, unless it is the default one."""
    default = read_artifacts(bundled_artifacts()).fingerprint
    known = place.plan.model_fingerprint == default
    return () if known else ("--model", place.plan.model_source)


def _commands(*lines: Sequence[str]) -> str:
    """Lines for a shell, whatever the names in them hold."""
    return "\n".join(shlex.join(("spp", *words)) for words in lines)


def _engines(place: Place, counts: DenseCounts) -> tuple[Engine, ...]:
    plan = place.plan
    if place.kind == "onnx":
        said = mapping(place.config.get("spp_onnx"))
        attention, precision = said.get("attention"), said.get("precision")
        if attention not in ATTENTIONS or precision not in PRECISIONS:
            return ()
        return onnx_engines(plan.written_layout, attention, precision, place.quantised or None)
    if place.kind == "gguf":
        return gguf_engines(text(mapping(place.config.get("spp_gguf")).get("architecture")))
    layers = [
        LayerShape(
            len(layer.query_heads),
            len(layer.kv_heads),
            (counts.channels or 0) if layer.channels is None else len(layer.channels),
        )
        for layer in plan.layers
    ]
    return engines_for(plan.written_layout, layers)


def _provenance(place: Place) -> tuple[Fact, ...]:
    plan = place.plan
    scenario = plan.scenario
    facts = [
        Fact("Model", plan.model_source),
        Fact("Model fingerprint", plan.model_fingerprint, code=True),
        Fact("Plan, SHA-256", place.plan_hash, code=True),
        Fact("Scenario", text(scenario.get("name"))),
        Fact("Scenario, SHA-256", text(scenario.get("sha256")), code=True),
        Fact("Artifacts, SHA-256", text(plan.artifacts.get("sha256")), code=True),
        Fact("Layout", f"{plan.layout}, padded" if plan.padded else plan.layout),
        Fact("Criterion", pairs(plan.criterion).removeprefix("name ")),
        Fact("Policy", pairs(plan.policy).removeprefix("name ")),
        Fact("Compensation", plan.compensation),
        Fact("Calibration", pairs(plan.calibration)),
        Fact("Budget asked", pairs(plan.budget.get("asked"))),
        Fact("Budget realised", _realised(plan)),
    ]
    return tuple(fact for fact in facts if fact.value)


def _realised(plan: Plan) -> str:
    """What the budget came to, in the currency it was asked in."""
    found = mapping(plan.budget.get("realised"))
    keep, cost, limit = (number(found.get(key)) for key in ("keep", "cost", "limit"))
    words = [] if keep is None else [f"keep {figure(keep, 4)}"]
    if cost is not None and limit is not None:
        words.append(f"{count(cost)} of at most {count(limit)} {text(found.get('kind'))}".rstrip())
    return ", ".join(words) or pairs(found)


NAME = "verify.json"


def read_verdict(directory: Path) -> tuple[Mapping[str, Any] | None, str]:
    """The report in a directory, or None and why there is none to show."""
    if not (directory / NAME).is_file():
        return None, "This export was not verified when it was written."
    try:
        found = read_json(directory / NAME, what="report", error=ModelError)
    except SppError as error:
        return None, str(error)
    if not isinstance(found, dict) or not isinstance(found.get("passed"), bool):
        return None, f"{NAME} is no report of checks."
    return found, ""


def checks_part(verdict: Mapping[str, Any], reference: str) -> Checks:
    """Every check that the report holds. It has passed where all of them have.

    reference: what the export was compared with.
    """
    found = tuple(
        Check(
            text(check.get("name")),
            check.get("passed") is True,
            number(check.get("found")),
            number(check.get("limit")),
            text(check.get("detail")),
        )
        for check in objects(verdict.get("checks"))
    )
    precise, dtype = text(verdict.get("reference")), text(verdict.get("computed_in"))
    notes = [f"The reference is {reference}."]
    if precise and dtype:
        notes = [
            f"The reference is {reference}, in {precise}; the export computed in {dtype}. A limit "
            "is what the masked model itself loses to rounding, and a little more."
        ]
    passed = verdict["passed"] and all(check.passed for check in found)
    return Checks(passed, found, tuple(notes))


def unverified(why: str, command: str) -> Hint:
    """A section without checks, and what makes them."""
    return Hint(f"{why} Check it against its dense model:", command)


def quality_facts(verdict: Mapping[str, Any]) -> tuple[Fact, ...]:
    """Figures on text that the plan has not seen, and what quantising cost."""
    found = mapping(verdict.get("quality"))
    ratio, dense, slim = (
        number(found.get(name)) for name in ("ratio", "dense_perplexity", "slim_perplexity")
    )
    facts = []
    if ratio is not None:
        beside = (
            "" if dense is None or slim is None else f" ({figure(slim, 4)} / {figure(dense, 4)})"
        )
        facts.append(Fact("Perplexity over dense", f"{times(ratio, 4)}{beside}"))
    facts += _distances(found, "dense")
    if sizes := [number(found.get(name)) for name in ("texts", "tokens")]:
        texts, tokens = sizes
        if texts is not None and tokens is not None:
            held_out = f"{count(texts)} held-out texts of the scenario, {count(tokens)} tokens"
            facts.append(Fact("Measured on", held_out))
    facts += _distances(mapping(verdict.get("quantisation")), "unquantised")
    return tuple(facts)


def _distances(found: Mapping[str, Any], other: str) -> list[Fact]:
    kl, top1 = number(found.get("mean_kl")), number(found.get("top1"))
    facts = []
    if kl is not None:
        facts.append(Fact(f"Mean KL to {other}", f"{figure(kl)} nats per token"))
    if top1 is not None:
        facts.append(Fact(f"Same first token as {other}", percent(top1)))
    return facts
