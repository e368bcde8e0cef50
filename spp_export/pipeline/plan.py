"""`plan`: diagnose a scenario, score the heads for it, and choose what stays under a budget."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spp_export.allocate import BoolArray, GivenOptions, Options, layer_options
from spp_export.artifacts import Artifacts
from spp_export.bound import Predicted, predicted
from spp_export.budget import DEFAULT_KEEP, Budget
from spp_export.checkpoint.reader import read_float
from spp_export.diagnosis import Diagnosis, FloatArray, mix_importance
from spp_export.engines import Engine, engines_for
from spp_export.errors import UsageError
from spp_export.importance import CRITERIA, comparable
from spp_export.importance.obs import removal_losses
from spp_export.models import DEMO
from spp_export.moments import Moments
from spp_export.pipeline.calibration import scenario_moments
from spp_export.pipeline.compensation import compensated_shape
from spp_export.pipeline.diagnose import diagnose_prompts
from spp_export.plans import (
    COMPENSATIONS,
    LAYOUTS,
    Compensation,
    LayerPlan,
    Layout,
    Plan,
    compile_options,
    cover,
    forced_heads,
)
from spp_export.progress import Progress, no_progress
from spp_export.published import published_mask, published_text
from spp_export.scenario import Scenario, read_scenario
from spp_export.session import Session, open_artifacts, open_session
from spp_export.shape import ModelShape
from spp_export.versions import library_versions

POLICIES = ("exact", "published")
CRITERION_NAMES = (*CRITERIA, "obs")
# `obs` assumes that what stays is re-fitted; without that, energy is the better guide.
DEFAULT_CRITERION = {"lstsq": "obs", "bias": "energy", "none": "energy"}
HOW_COMPARABLE = "standardised"
_PUBLISHED_IMPORTANCE = "head/published"


@dataclass(frozen=True)
class PlanRequest:
    """What the user may ask of a plan; `spp plan` and `spp export` take the same."""

    keep: float | None = None
    max_params: int | None = None
    max_kv_bytes: int | None = None
    strength: float | None = None
    layout: str = "per-layer"
    criterion: str | None = None
    policy: str = "exact"
    compensate: str = "lstsq"
    regime: str | None = None

    @property
    def budget(self) -> Budget:
        """The budget asked for; the default share where none was."""
        asked = (self.keep, self.max_params, self.max_kv_bytes, self.strength)
        if asked == (None, None, None, None):
            return Budget(keep=DEFAULT_KEEP)
        return Budget(*asked)

    def check(self) -> None:
        """UsageError for a word that names nothing, or a budget that is none."""
        self.budget.as_json()
        for option, value, known in (
            ("--layout", self.layout, LAYOUTS),
            ("--criterion", self.criterion or "obs", CRITERION_NAMES),
            ("--policy", self.policy, POLICIES),
            ("--compensate", self.compensate, COMPENSATIONS),
        ):
            if value not in known:
                raise UsageError(f"{option} {value}: expected one of {', '.join(known)}.")


@dataclass(frozen=True)
class PlanResult:
    """A compiled plan, why it is so, and what it will come to."""

    plan: Plan
    shape: ModelShape
    diagnosis: Diagnosis | None
    predicted: Predicted

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Engines that will, or will not, load what the plan describes."""
        return engines_for(self.plan.layout, self.plan.layer_shapes(self.shape))

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: `plan` is the document that `--plan` reads."""
        return {
            "plan": json.loads(self.plan.to_json()),
            "dense_heads": {"query": self.shape.query_heads, "kv": self.shape.kv_heads},
            "engines": [engine.to_dict() for engine in self.engines],
        }


def plan(
    scenario: str | os.PathLike[str],
    *,
    model: str = DEMO,
    artifacts: str | os.PathLike[str] | None = None,
    request: PlanRequest | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    progress: Progress = no_progress,
) -> PlanResult:
    """Compile the plan for a scenario file (or "-"); nothing is written."""
    request = request or PlanRequest()
    request.check()
    text = read_scenario(scenario)
    session = open_session(model, device=device, dtype=dtype, progress=progress)
    found = open_artifacts(artifacts, model, session.source)
    return plan_scenario(session, found, text, request)


def plan_scenario(
    session: Session, artifacts: Artifacts, scenario: Scenario, request: PlanRequest
) -> PlanResult:
    """Compile the plan from the scenario's calibration prompts; the held-out ones are not seen."""
    request.check()
    shape = session.source.shape
    written = compensated_shape(session.source, request.compensate)
    calibration, _ = scenario.split()
    diagnosis = diagnose_prompts(session, artifacts, calibration, request.regime)
    if request.policy == "published":
        layers, provenance = _published(session, artifacts, scenario, request)
    else:
        options, provenance = _options(session, artifacts, diagnosis, calibration, request)
        layers, realised = compile_options(
            options,
            # Biases that compensation adds are no share of the heads, but parameters all the same.
            shape if request.max_params is None else written,
            request.budget,
            _layout(request),
            session.source.family.stock_accepts(shape),
            breadth=diagnosis.breadth,
        )
        whole = written.parameters([layer.shape(shape) for layer in layers])
        realised = replace(realised, parameters=whole)
        provenance |= {
            "policy": {"name": "exact", "whitelist": len(artifacts.whitelist)},
            "budget": {"asked": request.budget.as_json(), "realised": realised.as_json()},
        }
    sizes = predicted(shape, [layer.shape(shape) for layer in layers], written)
    compiled = Plan(
        session.source.fingerprint,
        session.source.name,
        _layout(request),
        _compensation(request),
        layers,
        scenario=scenario_record(scenario),
        artifacts=artifacts_record(artifacts),
        diagnosis=diagnosis.to_dict(),
        predicted=sizes.as_json(),
        versions=library_versions(),
        **provenance,
    )
    return PlanResult(compiled, shape, diagnosis, sizes)


def scenario_record(scenario: Scenario) -> dict[str, Any]:
    """Which scenario decided, for plan.json."""
    _, held_out = scenario.split()
    return {
        "name": scenario.name,
        "sha256": scenario.sha256,
        "prompts": len(scenario.prompts),
        "held_out": len(held_out),
    }


def artifacts_record(artifacts: Artifacts) -> dict[str, Any]:
    """Which artifacts decided, for plan.json."""
    return {"sha256": artifacts.sha256, "domains": list(artifacts.domains)}


def _options(
    session: Session,
    artifacts: Artifacts,
    diagnosis: Diagnosis,
    calibration: Sequence[str],
    request: PlanRequest,
) -> tuple[Options, dict[str, Any]]:
    """What every regular size of every layer is worth by the criterion, and its provenance."""
    shape = session.source.shape
    criterion = request.criterion or DEFAULT_CRITERION[request.compensate]
    forced = forced_heads(artifacts.whitelist, shape)
    if criterion == "obs":
        moments = scenario_moments(session, artifacts, diagnosis.shares, calibration)
        return removal_options(session, moments, forced), {"criterion": {"name": criterion}}
    key = f"head/{criterion}"
    if key not in artifacts.importance:
        raise UsageError(
            f"--criterion {criterion}: the artifacts hold "
            f"{', '.join(sorted(artifacts.importance))}. Make them again with 'spp probe'."
        )
    scores = comparable(mix_importance(artifacts.importance[key], diagnosis), HOW_COMPARABLE)
    provenance = {"criterion": {"name": criterion, "comparable": HOW_COMPARABLE}}
    return layer_options(scores, shape, forced), provenance


def removal_options(session: Session, moments: Moments, forced_LH: BoolArray) -> Options:
    """`obs` for all layers: minus the loss of every size, in units of the residual stream."""
    source = session.source
    shape, family = source.shape, source.family
    size = (shape.num_layers, shape.kv_heads, shape.group_size)
    value = np.zeros(size)
    sets = np.zeros((*size, *size[1:]), dtype=bool)
    sensitivity = moments.sensitivity()
    with session.progress("weighing heads", shape.num_layers) as advance_to:
        for layer in range(shape.num_layers):
            weight = read_float(source.tensors[f"{family.layer_name(layer, family.output)}.weight"])
            losses, sets[layer] = removal_losses(
                weight, moments.second(layer), forced_LH[layer].reshape(size[1:])
            )
            value[layer] = -losses * sensitivity[layer]
            advance_to(layer + 1)
    return GivenOptions(value, sets)


def _layout(request: PlanRequest) -> Layout:
    return "uniform" if request.layout == "uniform" else "per-layer"


def _compensation(request: PlanRequest) -> Compensation:
    return next(known for known in COMPENSATIONS if known == request.compensate)


def _published(
    session: Session, artifacts: Artifacts, scenario: Scenario, request: PlanRequest
) -> tuple[tuple[LayerPlan, ...], dict[str, Any]]:
    """SubspacePath Pruner's released online algorithm, and the regular layers around its mask."""
    shape = session.source.shape
    if request.strength is None or request.layout == "uniform":
        raise UsageError(
            "--policy published takes its own budget, --strength ETA, and the per-layer layout."
        )
    if _PUBLISHED_IMPORTANCE not in artifacts.importance:
        raise UsageError(
            "--policy published needs imported artifacts. Make them with 'spp artifacts import'."
        )
    probed = artifacts.probe_layers
    probabilities = _attention_probabilities(session, artifacts, published_text(scenario))
    importance = artifacts.importance[_PUBLISHED_IMPORTANCE].transpose(1, 2, 0)
    result = published_mask(
        probabilities[list(probed)], importance, artifacts.whitelist, request.strength
    )
    layers = cover(result.mask, shape, importance.max(axis=2))
    kept = sum(len(layer.query_heads) for layer in layers)
    heads = shape.num_layers * shape.query_heads
    provenance = {
        "criterion": {"name": "published"},
        "policy": {
            "name": "published",
            "note": "the published mask zeroes blocks of the residual stream after o_proj; here "
            "its heads are removed, and every layer is completed to a regular shape",
            "inferred": [artifacts.domains[k] for k in result.inferred],
            "mask_pruning_ratio": round(result.ratio, 6),
        },
        "budget": {
            "asked": {"strength": request.strength},
            "realised": {"query_heads": kept, "of": heads},
        },
    }
    return layers, provenance


def _attention_probabilities(session: Session, artifacts: Artifacts, text: str) -> FloatArray:
    """Uncalibrated probe outputs [L,K] on the attention output alone, as the release computes
    them: its hook never sees the residual stream."""
    from spp_export.activations import TextMeans, observe, token_batches

    shape = session.source.shape
    means = TextMeans("attention", 1, shape.num_layers, shape.hidden_size)
    observe(session.model, session.source.family, token_batches(session.tokenizer, [text]), [means])
    logits = np.einsum("ld,lkd->lk", means.values[0], artifacts.weight) + artifacts.bias
    probabilities: FloatArray = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
    return probabilities


def plan_tensors(session: Session, compiled: Plan) -> list[dict[str, Sequence[Any]]]:
    """Every tensor that slicing changes: name, old and new shape."""
    shape, family = session.source.shape, session.source.family
    before = family.tensors(shape, shape.layers)
    after = family.tensors(shape, compiled.layer_shapes(shape))
    return [
        {"name": old.name, "dense": old.shape, "slim": new.shape}
        for old, new in zip(before, after, strict=True)
        if old.shape != new.shape
    ]
