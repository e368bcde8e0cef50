"""`show`: what a plan, artifacts, checkpoint or evaluation is, without running anything."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_export.commands.requests import ShowRequest
from spp_export.commands.show_model import model_facts
from spp_export.common.errors import ArtifactsError, ModelError, PlanError, SppError, UsageError
from spp_export.common.json_files import read_json
from spp_export.common.manifest import MANIFEST_NAME, check_manifest, listed_names
from spp_export.common.options import PathLike, command
from spp_export.data.artifacts import Artifacts, read_artifacts
from spp_export.evaluation.harness.records import RESULTS, Results, read_results
from spp_export.evaluation.harness.table import interval, notes, ranking, units_name
from spp_export.evaluation.remarks import FEW_TOKENS
from spp_export.formats.format import Format
from spp_export.formats.registry import FORMATS, detect_format
from spp_export.models.checkpoint.checkpoint import (
    ADAPTER_NAME,
    CONFIG_NAME,
    open_source,
    read_config,
)
from spp_export.models.dequantise import find_model
from spp_export.models.families import FAMILIES, known
from spp_export.models.hub import DEMO, DEMO_NAME, stored_model
from spp_export.planning import Plan, read_plan

_SIZES = ("parameters", "file_bytes", "kv_bytes_per_token")
# More deviations than this apart, no two domains are.
_FAR = 1e9


@dataclass(frozen=True)
class Shown:
    """What a path is, the facts about it, and what is wrong with its files.

    kind      "plan", "artifacts", "dense model", "guessed record", "evaluation", or that of an
              export's format
    facts     JSON values by name, in the order to show them
    problems  how its files differ from the manifest, one line each: missing, extra, of another size
              or SHA-256; None where no manifest says what they should be
    """

    kind: str
    facts: Mapping[str, Any]
    problems: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        problems = None if self.problems is None else list(self.problems)
        return {"kind": self.kind, "facts": dict(self.facts), "problems": problems}


@command(ShowRequest)
def show(request: ShowRequest) -> Shown:
    """Say what is at a path; weights are hashed where a manifest lists them, and never loaded.

    Of what was damaged since it was written, what can still be read is shown, with the problems.
    Raises UsageError where it is nothing we know, and the reader's own error where it is malformed
    and no manifest tells more.

        print(spp_export.show("out/chemistry").facts)
    """
    place = _place(request.path)
    if request.guess:
        return _guessed(place)
    if request.dequantize:
        location = find_model(os.fspath(place), dequantize=True)
        return Shown("dense model", model_facts(open_source(location.path, location.name)))
    if place.suffix == ".jsonl" and place.is_file():
        return Shown("evaluation", _evaluation_facts(read_results(place)))
    if not place.is_dir() and place.suffix != ".json":
        raise UsageError(
            f"{place}: expected a plan (.json), results of 'spp eval' (.jsonl), or a directory: an "
            "export, artifacts, a model."
        )
    if not place.is_dir():
        return Shown("plan", _plan_facts(read_plan(place)))
    if (place / RESULTS).is_file():
        return Shown("evaluation", _evaluation_facts(read_results(place / RESULTS)))
    names = {path.name for path in place.iterdir()} | listed_names(place)
    if "artifacts.json" in names:
        return _artifacts(place)
    if "plan.json" in names:
        return _export(place, detect_format(place, names) or FORMATS["safetensors"])
    if names & {CONFIG_NAME, ADAPTER_NAME}:  # of an adapter it says what it is
        return Shown("dense model", model_facts(open_source(place)), _problems(place))
    raise UsageError(
        f"{place}: is neither an export, an artifacts directory, a model nor an evaluation; it has "
        f"no plan.json, artifacts.json, config.json or {RESULTS}."
    )


def _place(path: PathLike) -> Path:
    """A path, or that of a model of this machine's cache by its name. Raises UsageError."""
    place = Path(path)
    if place.exists():
        return place
    name = os.fspath(path)
    stored = stored_model(DEMO_NAME if name == DEMO else name)
    if stored is None:
        raise UsageError(
            f"{place}: no such file or directory, and no model of that name in the cache, of which "
            "'spp cache' tells."
        )
    return stored


def _guessed(place: Path) -> Shown:
    """The record of an architecture that has none, and that the model's tensors are as it says."""
    config = read_config(place)
    name = config.get("model_type")
    if name in FAMILIES:
        raise UsageError(f"{place}: {name} models have a record. Drop --guess.")

    from spp_export.evaluation.guessing.guess import guess, written

    with tempfile.TemporaryDirectory() as scratch:
        found = guess(config, Path(scratch))
    facts: dict[str, Any] = {
        "family": name,
        "record": written(found.family).splitlines(),
        "proven": dict(found.proven),
        "next": "add the record to spp_export/models/families/table.py, as CONTRIBUTING.md shows",
    }
    if any(place.glob("*.safetensors")):
        with known(found.family):
            facts |= model_facts(open_source(place))
    return Shown("guessed record", facts)


def _evaluation_facts(results: Results) -> dict[str, Any]:
    header = results.header
    facts: dict[str, Any] = {
        "model": header["model"]["name"],
        "scenario": header["scenario"]["name"],
        "texts": {name: f"{text['documents']} documents" for name, text in header["texts"].items()},
        "rows": len(results.measured),
        "failed": len(results.failed),
        "machine": dict(header["machine"]),
    }
    if found := notes(results):
        facts["notes"] = found
    for (keep, units), rows in ranking(results).items():
        best = next((ranked for ranked in rows if ranked.row.kind == "method"), None)
        if best is not None:
            figures = f"KL {interval(best.kl)}, perplexity x {interval(best.ratio[results.judge])}"
            facts[f"best at {keep:g} of {units_name(units)}"] = (
                f"{best.row.label}, {best.row.compensation}: {figures} on {results.judge}"
            )
    return facts


def _problems(place: Path) -> tuple[str, ...] | None:
    return tuple(check_manifest(place)) if (place / MANIFEST_NAME).is_file() else None


def _artifacts(place: Path) -> Shown:
    problems = _problems(place)
    try:
        return Shown("artifacts", _artifacts_facts(read_artifacts(place)), problems)
    except ArtifactsError as error:
        if not problems:
            raise
        return Shown("artifacts", {}, (str(error), *problems))


def _export(place: Path, made: Format[Any]) -> Shown:
    problems = tuple(check_manifest(place))
    try:
        facts = {**made.facts(place), **_plan_facts(_own_plan(place))}
    except (ModelError, PlanError) as error:
        return Shown(made.kind, {}, (str(error), *problems))
    return Shown(made.kind, {**facts, "bytes": _size(place), **_verdict(place)}, problems)


def _own_plan(place: Path) -> Plan:
    path = place / "plan.json"
    if path.is_symlink() or not path.is_file():
        raise PlanError(f"{path}: expected a regular file.")
    return read_plan(path)


def _size(place: Path) -> int:
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())


def _verdict(place: Path) -> dict[str, Any]:
    """What verify.json says, as far as it can be read."""
    path = place / "verify.json"
    if not path.is_file():
        return {"verified": "no"}
    try:
        report = read_json(path, what="report", error=ModelError)
    except SppError as error:
        return {"verified": str(error)}
    if not isinstance(report, dict) or not isinstance(report.get("passed"), bool):
        return {"verified": "verify.json is no report"}
    facts: dict[str, Any] = {"verified": "passed" if report["passed"] else "failed"}
    if checks := report.get("checks"):
        facts["checks"] = _checks(checks)
    quality = report.get("quality")
    if isinstance(quality, dict) and isinstance(quality.get("ratio"), float):
        facts["perplexity_ratio"] = quality["ratio"]
        if isinstance(tokens := quality.get("tokens"), int):
            uncertain = " (uncertain)" if tokens < FEW_TOKENS else ""
            facts["measured_on"] = f"{tokens:,} tokens{uncertain}"
    match report.get("quantisation"):
        case {"mean_kl": float(kl), "top1": float(share)}:
            facts["quantisation"] = {"mean_kl": kl, "top1": share}
    return facts


def _checks(checks: Any) -> str:
    """How many of a report's checks hold, and the names of the others."""
    if not isinstance(checks, list) or not all(isinstance(check, dict) for check in checks):
        return "malformed"
    failed = [str(check.get("name")) for check in checks if check.get("passed") is not True]
    text = f"{len(checks) - len(failed)} of {len(checks)} hold"
    return f"{text}, not: {', '.join(failed)}" if failed else text


def _plan_facts(plan: Plan) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "model": plan.model_source,
        "fingerprint": plan.model_fingerprint,
        "layout": plan.layout,
        "padded": True if plan.padded else None,
        "compensation": plan.compensation,
        "layers": len(plan.layers),
        "query_heads": [len(layer.query_heads) for layer in plan.layers],
        "kv_heads": [len(layer.kv_heads) for layer in plan.layers],
    }
    if any(layer.channels is not None for layer in plan.layers):
        kept = [None if layer.channels is None else len(layer.channels) for layer in plan.layers]
        facts["channels"] = kept
    if any(layer.experts is not None for layer in plan.layers):
        facts["experts"] = [
            None if layer.experts is None else len(layer.experts) for layer in plan.layers
        ]
    if any(layer.expert_channels for layer in plan.layers):
        facts["expert_channels"] = [layer.expert_width for layer in plan.layers]
    realised = plan.budget.get("realised")
    facts |= {
        "scenario": plan.scenario.get("name"),
        "scenario_sha256": plan.scenario.get("sha256"),
        **{name: plan.diagnosis.get(name) for name in ("mixture", "breadth", "regime")},
        "asked": plan.budget.get("asked"),
        "realised_keep": realised.get("keep") if isinstance(realised, Mapping) else None,
        "criterion": plan.criterion.get("name"),
        "policy": plan.policy.get("name"),
        **{name: plan.predicted.get(name) for name in _SIZES},
        "versions": dict(plan.versions) or None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _artifacts_facts(artifacts: Artifacts) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "model": artifacts.manifest.get("model"),
        "fingerprint": artifacts.fingerprint or None,
        "sha256": artifacts.sha256,
        "domains": list(artifacts.domains),
        "regimes": list(artifacts.regimes),
        "layers": artifacts.num_layers,
        "probed_layers": len(artifacts.probe_layers),
        "query_heads": artifacts.query_heads,
        "hidden_size": artifacts.hidden_size,
        "importance": sorted(artifacts.importance),
        "whitelisted_heads": len(artifacts.whitelist),
        "calibration_texts": len(artifacts.calibration),
    }
    accuracy = artifacts.manifest.get("validation_accuracy")
    if isinstance(accuracy, list) and accuracy:
        facts["validation_accuracy"] = accuracy
    measured = {
        "shrinkage": artifacts.shrinkage,
        "scenario_weight": artifacts.scenario_weight,
    }
    facts |= {name: value for name, value in measured.items() if name in artifacts.manifest}
    for name in ("tokens", "reliability", "regime_choice"):
        facts[name] = artifacts.manifest.get(name)
    facts["axes"] = _axes_facts(artifacts.manifest.get("axes"))
    return {name: value for name, value in facts.items() if value is not None}


def _axes_facts(axes: Any) -> dict[str, Any] | None:
    """The manifest's figures on axes with the angles in degrees between all candidates'."""
    match axes:
        case {
            "layer": int(),
            "dimensions": int(),
            "variance": variance,
            "candidates": list(names),
            "cosines": list(rows),
            "separation": dict(apart),
        }:
            pass
        case _:
            return None
    known = all(isinstance(name, str) for name in names) and _between(variance, 0, 1)
    distances = [value for value in apart.values() if value is not None]
    if not known or not all(_between(value, 0, _FAR) for value in distances):
        return None
    if not isinstance(axes.get("selected", []), list):
        return None
    square = len(rows) == len(names) and all(
        isinstance(row, list) and len(row) == len(names) and all(_between(c, -1, 1) for c in row)
        for row in rows
    )
    if not square:
        return None
    angles = [[round(math.degrees(math.acos(c)), 1) for c in row] for row in rows]
    return {**axes, "angles": angles}


def _between(value: Any, low: float, high: float) -> bool:
    """Whether a JSON value is a number in a range."""
    return type(value) in (int, float) and low <= value <= high
