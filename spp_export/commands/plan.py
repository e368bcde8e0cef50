"""`plan`: diagnose a scenario, score the heads for it, and choose what stays under a budget."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spp_export.calibration.mixture import Mixing, Part, calibration_parts
from spp_export.commands.diagnose import diagnose_prompts
from spp_export.common.errors import UsageError
from spp_export.common.progress import Progress, no_progress
from spp_export.common.versions import library_versions
from spp_export.data.artifacts import DOMAIN_SHRINKAGE, SCENARIO_WEIGHT, Artifacts
from spp_export.data.scenario import Scenario, read_scenario
from spp_export.domains.diagnosis import Diagnosis, FloatArray
from spp_export.importance import COMPARABLE
from spp_export.latency_file import read_latency_table
from spp_export.models.engines import Engine, engines_for
from spp_export.models.families import Role
from spp_export.models.hub import DEMO
from spp_export.models.session import Session, open_artifacts, open_session
from spp_export.models.shape import ModelShape
from spp_export.planning import (
    COMPENSATIONS,
    LAYOUTS,
    Compensation,
    LayerPlan,
    Layout,
    Plan,
    compile_units,
    cover,
    exactly,
    forced_heads,
)
from spp_export.planning.bound import Predicted, predicted
from spp_export.planning.budget import COSTS, DEFAULT_KEEP, UNITS, Budget, Cost, Units, unit_cost
from spp_export.planning.latency import LatencyTable
from spp_export.planning.published import published_mask, published_text
from spp_export.planning.scoring import CRITERION_NAMES, DEFAULT_CRITERION, OBS, Scoring
from spp_export.slicing.compensation import compensated_shape, losing_roles

POLICIES = ("exact", "published")
# Of --keep and --strength where no word is said of units.
DEFAULT_UNITS: Units = "heads"
DEFAULT_MULTIPLE = 64
# A consumer loses inputs unless only the units of the other one may go.
_LOSING = {Role.OUTPUT: "channels", Role.DOWN: "heads"}
_PUBLISHED_IMPORTANCE = "head/published"


@dataclass(frozen=True)
class PlanRequest:
    """What the user may ask of a plan; `spp plan` and `spp export` take the same.

    profile: a file with a table of latency, where that is the cost. tp: the cards that a server
    will spread every layer over.
    """

    keep: float | None = None
    max_params: int | None = None
    max_kv_bytes: int | None = None
    strength: float | None = None
    layout: str = "per-layer"
    criterion: str | None = None
    policy: str = "exact"
    compensate: str = "lstsq"
    regime: str | None = None
    units: str = DEFAULT_UNITS
    comparable: str | None = None
    width_multiple: int = DEFAULT_MULTIPLE
    shrinkage: float | None = None
    adapt: bool = True
    seed: int = 0
    cost: str = "params"
    profile: str | None = None
    max_latency: float | None = None
    tp: int = 1

    @property
    def budget(self) -> Budget:
        """The budget asked for; the default share where none was."""
        asked = (self.keep, self.max_params, self.max_kv_bytes, self.strength)
        cost: Cost = next((known for known in COSTS if known == self.cost), "params")
        if all(limit is None for limit in (*asked, self.max_latency)):
            return Budget(keep=DEFAULT_KEEP, units=_units(self), cost=cost)
        return Budget(*asked, units=_units(self), cost=cost, max_latency=self.max_latency)

    @property
    def criterion_name(self) -> str:
        """The criterion asked for; the default one of the compensation where none was."""
        return self.criterion or DEFAULT_CRITERION[self.compensate]

    def check(self) -> None:
        """UsageError for a word that names nothing, or a budget that is none."""
        for option, value, known in (
            ("--units", self.units, UNITS),
            ("--layout", self.layout, LAYOUTS),
            ("--criterion", self.criterion or OBS, CRITERION_NAMES),
            ("--comparable", self.comparable or "raw", COMPARABLE),
            ("--policy", self.policy, POLICIES),
            ("--compensate", self.compensate, COMPENSATIONS),
            ("--cost", self.cost, COSTS),
        ):
            if value not in known:
                raise UsageError(f"{option} {value}: expected one of {', '.join(known)}.")
        self.budget.as_json()
        self._check_cost()
        if self.tp < 1:
            raise UsageError(f"--tp {self.tp}: expected 1 or more.")
        if self.tp > 1 and (self.layout == "ragged" or self.policy == "published"):
            raise UsageError("--tp: only regular plans of policy exact divide among cards.")
        if self.width_multiple < 1:
            raise UsageError(f"--width-multiple {self.width_multiple}: expected 1 or more.")
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise UsageError(f"--shrinkage {self.shrinkage}: expected a number in [0, 1].")
        if self.criterion_name == OBS and self.comparable is not None:
            raise UsageError("--comparable: obs weighs losses in one currency; leave it out.")

    def _check_cost(self) -> None:
        if (self.cost == "latency") != (self.profile is not None):
            raise UsageError(
                "--cost latency and --profile FILE go together: the file is the table that "
                "'spp bench --profile' wrote."
            )
        if self.cost == "latency" and self.layout == "ragged":
            raise UsageError("--layout ragged: tables of latency have regular layers only.")
        if self.cost != "params" and self.policy == "published":
            raise UsageError("--policy published takes no --cost: it has a budget of its own.")
        self.latency()

    def latency(self) -> LatencyTable | None:
        """The table asked for, if any. Raises ProfileError."""
        return None if self.profile is None else read_latency_table(self.profile)


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
        return engines_for(self.plan.written_layout, self.plan.written_shapes(self.shape))

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
    layerwise: bool | None = None,
    progress: Progress = no_progress,
) -> PlanResult:
    """Compile the plan for a scenario file (or "-"); nothing is written.

    `layerwise` is as of `verify`.
    """
    request = request or PlanRequest()
    request.check()
    text = read_scenario(scenario)
    session = open_session(
        model, device=device, dtype=dtype, layerwise=layerwise, progress=progress
    )
    found = open_artifacts(artifacts, model, session.source)
    return plan_scenario(session, found, text, request)


def plan_scenario(
    session: Session, artifacts: Artifacts, scenario: Scenario, request: PlanRequest
) -> PlanResult:
    """Compile the plan from the scenario's calibration prompts; the held-out ones are not seen."""
    request.check()
    shape = session.source.shape
    latency = request.latency()
    if latency:
        latency.check_model(shape)
    losing = frozenset(role for role, units in _LOSING.items() if request.units != units)
    written = compensated_shape(session.source, _layout(request), _compensation(request), losing)
    calibration, _ = scenario.split()
    diagnosis = diagnose_prompts(session, artifacts, calibration, request.regime)
    mixing = requested_mixing(artifacts, request)
    if request.policy == "published":
        layers, provenance = _published(session, artifacts, scenario, request)
    else:
        parts = calibration_parts(artifacts, diagnosis.shares, calibration, mixing)
        scoring = scoring_for(session, artifacts, parts, request, diagnosis.breadth, latency)
        options = scoring.options()
        layers, realised = compile_units(
            options.heads,
            options.channels,
            # Biases that compensation adds are no share of the heads, but parameters all the same.
            shape if request.max_params is None else written,
            request.budget,
            _layout(request),
            session.source.family.stock_accepts(shape),
            breadth=diagnosis.breadth,
            latency=latency,
            tensor_parallel=request.tp,
        )
        # What lost nothing after all gets no bias.
        losing = losing_roles(layers, shape)
        written = compensated_shape(
            session.source, _layout(request), _compensation(request), losing
        )
        whole = written.parameters([layer.shape(shape) for layer in layers])
        realised = replace(realised, parameters=whole)
        provenance = {
            "criterion": scoring.record(),
            "policy": {"name": "exact", "whitelist": len(artifacts.whitelist)},
            "budget": {
                "asked": {
                    **request.budget.as_json(),
                    **({"tensor_parallel": request.tp} if request.tp > 1 else {}),
                },
                "realised": realised.as_json(),
                **({"profile": latency.as_json()} if latency else {}),
            },
        }
    sizes = predicted(shape, [layer.shape(shape) for layer in layers], written, latency)
    compiled = Plan(
        session.source.fingerprint,
        session.source.name,
        _layout(request),
        _compensation(request),
        layers,
        scenario=scenario_record(scenario),
        artifacts=artifacts_record(artifacts),
        diagnosis=diagnosis.to_dict(),
        calibration={
            "shrinkage": mixing.shrinkage,
            "scenario_weight": mixing.scenario_weight,
        },
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


def requested_mixing(artifacts: Artifacts | None, request: PlanRequest) -> Mixing:
    """How domains and the scenario's own text are mixed: as asked, else as the artifacts found
    best on validation text; without either, as was found for the default model."""
    shrinkage = DOMAIN_SHRINKAGE if artifacts is None else artifacts.shrinkage
    weight = SCENARIO_WEIGHT if artifacts is None else artifacts.scenario_weight
    return Mixing(
        shrinkage if request.shrinkage is None else request.shrinkage,
        weight if request.adapt else 0.0,
    )


def scoring_for(
    session: Session,
    artifacts: Artifacts,
    parts: Sequence[Part],
    request: PlanRequest,
    breadth: float | None = None,
    latency: LatencyTable | None = None,
    *,
    whitelist: bool = True,
) -> Scoring:
    """How the request wants units scored for the text of `parts`."""
    shape = session.source.shape
    return Scoring(
        session,
        artifacts,
        tuple(parts),
        request.criterion_name,
        _units(request),
        forced_heads(artifacts.whitelist if whitelist else (), shape),
        request.comparable,
        1 - _kept_share(request.budget, shape, breadth, latency),
        request.width_multiple,
        request.seed,
        ragged=request.layout == "ragged",
    )


def _kept_share(
    budget: Budget, shape: ModelShape, breadth: float | None, latency: LatencyTable | None
) -> float:
    """The share of what the budget limits that may stay."""
    limit = budget.limit(shape, breadth, latency)
    dense = unit_cost(shape, shape.layers, budget.units, limit.kind, limit.latency)
    return min(max(limit.cost / dense, 0.0), 1.0)


def _units(request: PlanRequest) -> Units:
    return next((known for known in UNITS if known == request.units), DEFAULT_UNITS)


def _layout(request: PlanRequest) -> Layout:
    return next(known for known in LAYOUTS if known == request.layout)


def _compensation(request: PlanRequest) -> Compensation:
    return next(known for known in COMPENSATIONS if known == request.compensate)


def _published(
    session: Session, artifacts: Artifacts, scenario: Scenario, request: PlanRequest
) -> tuple[tuple[LayerPlan, ...], dict[str, Any]]:
    """SubspacePath Pruner's released online algorithm, and the layers around its mask."""
    shape = session.source.shape
    if request.strength is None or request.layout == "uniform":
        raise UsageError(
            "--policy published takes its own budget, --strength ETA, and the per-layer layout or "
            "the ragged one."
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
    ragged = request.layout == "ragged"
    layers = (exactly if ragged else cover)(result.mask, shape, importance.max(axis=2))
    kept = sum(len(layer.query_heads) for layer in layers)
    heads = shape.num_layers * shape.query_heads
    provenance = {
        "criterion": {"name": "published"},
        "policy": {
            "name": "published",
            "note": "the published mask zeroes blocks of the residual stream after o_proj; here "
            "its heads are removed"
            + ("" if ragged else ", and every layer is completed to a regular shape"),
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
    from spp_export.calibration.activations import TextMeans, observe, token_batches

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
    after = family.tensors(shape, compiled.written_shapes(shape))
    return [
        {"name": old.name, "dense": old.shape, "slim": new.shape}
        for old, new in zip(before, after, strict=True)
        if old.shape != new.shape
    ]
