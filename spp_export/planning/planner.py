"""From a request and scores to a plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from spp_export.calibration.answers import scenario_traffic
from spp_export.calibration.mixture import Mixing, WeightedTexts, calibration_parts
from spp_export.calibration.reading import ScenarioText, token_texts
from spp_export.calibration.stored import Kept
from spp_export.calibration.whole import in_blocks, passes
from spp_export.common.arrays import FloatArray
from spp_export.common.errors import PlanError, UsageError
from spp_export.common.versions import library_versions
from spp_export.data.artifacts import DOMAIN_SHRINKAGE, SCENARIO_WEIGHT, Artifacts
from spp_export.data.scenario import Scenario
from spp_export.domains.diagnosis import Diagnosis, check_regime, diagnose_scenario
from spp_export.importance.base import scored_units
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.engines import Engine, engines_for
from spp_export.models.families import Feature, Role
from spp_export.models.session import Session
from spp_export.models.shape import Kind, ModelShape, includes
from spp_export.planning import (
    LayerPlan,
    Plan,
    Realised,
    check_feasible,
    compile_units,
    cover,
    exactly,
    forced_heads,
    options_of,
)
from spp_export.planning.allocate.options import (
    channel_options,
    dividing_heads,
    expert_channel_options,
    expert_options,
    with_nothing,
)
from spp_export.planning.bound import Predicted, predicted
from spp_export.planning.budget import Budget, unit_cost
from spp_export.planning.latency import LatencyTable
from spp_export.planning.plan import layer_shapes
from spp_export.planning.published import published_mask, published_text
from spp_export.planning.request import PlanRequest
from spp_export.planning.scoring import Scoring, UnitOptions, check_criterion
from spp_export.planning.written import (
    compensated_shape,
    kept_tensors,
    layers_losing,
    losing_roles,
)

# The units that a consumer reads, and loses inputs with.
_LOSING: dict[Role, Kind] = {Role.OUTPUT: "heads", Role.DOWN: "channels"}
# transformers multiplies the rows of all experts in one kernel, each of a multiple of 16 bytes.
_EXPERT_ROW = 8
_PUBLISHED_IMPORTANCE = "head/published"
# The release cuts its text.
_PUBLISHED_TOKENS = 512


@dataclass(frozen=True)
class PlanResult:
    """A compiled plan, why it is so, what it will come to, and what was left in the cache."""

    plan: Plan
    shape: ModelShape
    diagnosis: Diagnosis | None
    predicted: Predicted
    kept: Kept = field(default_factory=Kept)

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Engines that will, or will not, load what the plan describes."""
        layers = self.plan.written_shapes(self.shape)
        return engines_for(self.shape.model_type, self.plan.written_layout, layers)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: `plan` is the document that `--plan` reads."""
        return {
            "plan": json.loads(self.plan.to_json()),
            "dense_heads": {"query": self.shape.query_heads, "kv": self.shape.kv_heads},
            "engines": [engine.to_dict() for engine in self.engines],
            "cached": self.kept.to_dict(),
        }


def plan_scenario(
    session: Session, artifacts: Artifacts, scenario: Scenario, request: PlanRequest
) -> PlanResult:
    """Compile the plan from the scenario's calibration part; the held-out one is not seen."""
    return Planning.begin(session, artifacts, scenario, request).within()


@dataclass(frozen=True)
class Planning:
    """Plans of one scenario for any budget: its text, its diagnosis, and what every size of every
    layer is worth, all known before the first plan.

    scored: by criterion, for the default one may depend on the budget. Nothing where the released
    algorithm decides.
    """

    session: Session
    artifacts: Artifacts
    scenario: Scenario
    request: PlanRequest
    text: ScenarioText
    diagnosis: Diagnosis
    mixing: Mixing
    latency: LatencyTable | None
    scored: dict[str, tuple[Scoring, UnitOptions]] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, session: Session, artifacts: Artifacts, scenario: Scenario, request: PlanRequest
    ) -> Planning:
        """Check what can be refused, then diagnose and score."""
        request.check()
        _check_family(session.source, request)
        latency = request.latency()
        if latency:
            latency.check_model(session.source.shape)
        _check_answerable(session, artifacts, request)
        written = _largest_written(session, request)
        if request.strength is None:
            _check_budget(session, artifacts, request, written, latency)
        limit = request.calibration_tokens
        diagnosis = diagnose_scenario(session, artifacts, scenario, request.regime, limit)
        if request.strength is not None:
            _check_budget(session, artifacts, request, written, latency, diagnosis.breadth)
        text = scenario_traffic(session, scenario, limit, request.answering)
        mixing = requested_mixing(artifacts, request)
        found = text, diagnosis, mixing, latency
        planning = cls(session, artifacts, scenario, request, *found)
        if request.policy != "published":
            planning._scored(request.budget)
        return planning

    def _scored(self, budget: Budget) -> tuple[Scoring, UnitOptions]:
        """How units are scored for a budget, and what the allocator chooses from."""
        session, request = self.session, self.request
        parts = calibration_parts(
            self.artifacts,
            self.diagnosis.shares,
            self.text.calibration.texts,
            self.mixing,
            answered=_answer_tokens(session, request) > 0,
        )
        known = self.diagnosis.breadth, self.latency
        scoring = scoring_for(session, self.artifacts, parts, request, *known, budget=budget)
        if scoring.criterion not in self.scored:
            options = scoring.options()
            if request.kv_divisors and options.heads is not None:
                options = replace(options, heads=dividing_heads(options.heads))
            self.scored[scoring.criterion] = scoring, options
        return self.scored[scoring.criterion]

    def within(self, budget: Budget | None = None) -> PlanResult:
        """The best plan within a budget; without one, within the request's."""
        session, artifacts, request = self.session, self.artifacts, self.request
        shape = session.source.shape
        if request.policy == "published":
            layers, provenance = _published(session, artifacts, self.scenario, request)
            written = _largest_written(session, request)
        else:
            scoring, options = self._scored(budget or request.budget)
            layers, realised, written = self._layers(options, budget or request.budget)
            provenance = {
                "criterion": scoring.record(),
                "policy": {
                    "name": "exact",
                    "whitelist": len(artifacts.whitelist),
                    "empty_layers": empty_layers(session.source, request),
                },
                "budget": {
                    "asked": {
                        **(budget or request.budget).to_dict(),
                        **({"tensor_parallel": request.tp} if request.tp > 1 else {}),
                        **({"kv_divisors": True} if request.kv_divisors else {}),
                    },
                    "realised": realised.to_dict(),
                    **({"profile": self.latency.to_dict()} if self.latency else {}),
                },
            }
        sizes = predicted(shape, layer_shapes(layers, shape), written, self.latency)
        told: dict[str, Any] = {
            "remarks": [
                *session.source.family.remarks,
                *_on_experts(shape, layers),
                *_on_expert_channels(shape, layers),
            ],
            # For readers that have no more of the dense model than this.
            "expert_channels": shape.expert_channels if _narrows(layers) else 0,
            "with_experts": [i for i, sparse in enumerate(shape.sparse) if sparse]
            if shape.has_mlps and any(layer.channels is not None for layer in layers)
            else [],
            "without_heads": sorted(shape.without_heads),
            "without_channels": sorted(i for i in shape.without_channels if not shape.sparse[i]),
        }
        compiled = Plan(
            session.source.fingerprint,
            session.source.name,
            request.layout,
            request.compensate,
            layers,
            scenario=scenario_record(self.scenario, self.text),
            artifacts=artifacts_record(artifacts),
            diagnosis=self.diagnosis.to_dict(),
            family={name: value for name, value in told.items() if value},
            calibration={
                "shrinkage": self.mixing.shrinkage,
                "scenario_weight": self.mixing.scenario_weight,
                "calibration_tokens": request.calibration_tokens,
                "answer_tokens": _answer_tokens(session, request),
                "answer_seed": request.seed,
                **({"matmul": session.matmul} if session.dtype == "float32" else {}),
                **self._moments(layers),
            },
            predicted=sizes.to_dict(),
            versions=library_versions(),
            **provenance,
        )
        return PlanResult(compiled, shape, self.diagnosis, sizes)

    def _moments(self, layers: Sequence[LayerPlan]) -> dict[str, str]:
        """Of which moments of wide MLPs the re-fit is to be made."""
        shape = self.session.source.shape
        losing = layers_losing(layers, Role.DOWN, shape)
        if self.request.compensate != "lstsq" or not losing or not in_blocks(shape):
            return {}
        whole = self.request.whole_moments and passes(self.session, len(losing))
        return {"moments": "whole" if whole else "blocks"}

    def _layers(
        self, options: UnitOptions, budget: Budget
    ) -> tuple[tuple[LayerPlan, ...], Realised, ModelShape]:
        """The layers, what they come to, and the shape that is written of them."""
        source, request = self.session.source, self.request
        layers, realised = compile_units(
            options.heads,
            options.channels,
            # Biases that compensation adds are no share of the heads, but parameters all the same.
            source.shape if budget.max_params is None else _largest_written(self.session, request),
            budget,
            request.layout,
            source.family.stock_accepts(source.shape),
            breadth=self.diagnosis.breadth,
            latency=self.latency,
            tensor_parallel=request.tp,
            experts=options.experts,
        )
        # What lost nothing after all gets no bias.
        losing = losing_roles(layers, source.shape)
        written = compensated_shape(source, request.layout, request.compensate, losing)
        whole = written.parameters(layer_shapes(layers, source.shape))
        return layers, replace(realised, parameters=whole), written


def _on_experts(shape: ModelShape, layers: Sequence[LayerPlan]) -> list[str]:
    """What a reader of a plan has to be told of experts that go."""
    counts = [n for n in shape.experts_in(layer_shapes(layers, shape)) if n]
    if sum(counts) == shape.experts * len(counts):
        return []
    each = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    return [
        f"{sum(counts)} of {shape.experts * len(counts)} experts stay, {each} in a layer; a token "
        f"is routed to {shape.experts_per_token} of them as before, and MLPs beside them stay"
    ]


def _on_expert_channels(shape: ModelShape, layers: Sequence[LayerPlan]) -> list[str]:
    """What a reader of a plan has to be told of experts' channels that go."""
    kept = shape.expert_widths(layer_shapes(layers, shape))
    if not kept or min(kept) == shape.expert_channels:
        return []
    each = " to ".join(str(count) for count in sorted({min(kept), max(kept)}))
    return [
        f"every expert keeps {each} of its {shape.expert_channels} channels, each its own and as "
        "many as the others of its layer; down projections of experts are not re-fitted, and MLPs "
        "beside experts stay"
    ]


def _narrows(layers: Sequence[LayerPlan]) -> bool:
    return any(layer.expert_channels is not None for layer in layers)


def _answer_tokens(session: Session, request: PlanRequest) -> int:
    """How long answers are: as asked, and none of a model that runs from disk. What is planned on
    is what the plan says, and so what is re-fitted on."""
    return 0 if session.reads_from_disk else request.answer_tokens


def _largest_written(session: Session, request: PlanRequest) -> ModelShape:
    """The shape that is written where every consumer that may lose inputs does."""
    losing = frozenset(role for role, kind in _LOSING.items() if includes(request.units, kind))
    if not session.source.shape.has_mlps:  # of experts nothing is compensated
        losing -= {Role.DOWN}
    return compensated_shape(session.source, request.layout, request.compensate, losing)


def _check_family(source: Checkpoint, request: PlanRequest) -> None:
    """Refuse what no export of the family can be, before anything is measured."""
    family = source.family
    if request.layout == "ragged" and not family.uneven_groups and source.shape.group_size > 1:
        raise PlanError(
            f"layout is ragged, and in the {family.model_type} family every KV head must serve as "
            "many query heads. Use per-layer."
        )
    if request.policy == "published":
        family.refuse((Feature.MIXERS, Feature.LATENT), "--policy published", "Use --policy exact.")
    if source.shape.cached and (request.budget.cost == "kv-bytes" or request.max_kv_bytes):
        raise PlanError(
            f"a budget of KV bytes: {family.model_type} caches latents for all heads together, so "
            "fewer heads cache as much. Plan by --keep or --max-params."
        )
    inside = source.shape.expert_channels and includes(request.units, "channels")
    if inside and request.budget.cost == "latency":
        raise PlanError(
            f"--units {request.units}: tables of latency know no channels of experts, which is "
            f"what goes of {family.model_type} models. Plan by --keep or --max-params."
        )
    if request.allow_empty_layers and (reason := _no_empty_layers(source, request)):
        raise PlanError(f"--allow-empty-layers: {reason}. Leave it out.")


def empty_layers(source: Checkpoint, request: PlanRequest) -> bool:
    """Whether a layer may keep no attention, or no MLP."""
    if request.allow_empty_layers is None:
        return not _no_empty_layers(source, request)
    return request.allow_empty_layers


def _no_empty_layers(source: Checkpoint, request: PlanRequest) -> str:
    """Why every layer keeps some heads and channels; "" where that is no must."""
    if request.layout == "uniform":
        return "a stock config cannot say that a layer has none"
    if request.policy == "published":
        return "policy published keeps a head of every layer"
    if request.tp > 1:
        return "--tp is for vLLM, which serves no such layer"
    return source.family.no_empty_layers(request.units)


def _check_answerable(session: Session, artifacts: Artifacts, request: PlanRequest) -> None:
    """What these artifacts and this model have no answer to, before a text is read."""
    shape = session.source.shape
    session.source.family.check_units(request.units, shape)
    narrower = "expert channel" in scored_units(request.units, shape)
    if request.layout == "uniform" and narrower and request.width_multiple % _EXPERT_ROW:
        raise UsageError(
            f"--width-multiple {request.width_multiple}: the kernel in which a stock model of "
            f"experts runs takes widths in multiples of {_EXPERT_ROW}. Give one, or --layout "
            "per-layer."
        )
    if request.regime is not None:
        check_regime(artifacts, request.regime)
    if request.policy == "published":
        if _PUBLISHED_IMPORTANCE not in artifacts.importance:
            raise UsageError(
                "--policy published needs imported artifacts. Make them with "
                "'spp artifacts import'."
            )
        return
    criterion = request.criterion_for(session, artifacts)
    check_criterion(session, artifacts, criterion, request.units)


def _check_budget(
    session: Session,
    artifacts: Artifacts,
    request: PlanRequest,
    written: ModelShape,
    latency: LatencyTable | None,
    breadth: float | None = None,
) -> None:
    """Errors of a budget that no plan meets, by the sizes of the model and its whitelist alone.

    written: with the biases that compensation may add.
    """
    if request.policy == "published":
        return
    shape = session.source.shape
    scores_LH = np.zeros((shape.num_layers, shape.query_heads))
    scores_LI = np.zeros((shape.num_layers, shape.channels))
    scores_SE = np.zeros((sum(shape.sparse), shape.experts))
    scores_SU = np.zeros((len(scores_SE), shape.experts * shape.expert_channels))
    forced = forced_heads(artifacts.whitelist, shape)
    empty = empty_layers(session.source, request)
    heads = options_of(request.layout)(scores_LH, shape, forced)
    heads = dividing_heads(heads) if request.kv_divisors else heads
    heads = with_nothing(heads, 0.0, forced) if empty else heads
    units, multiple = scored_units(request.units, shape), request.width_multiple
    no_mlp = empty and not session.source.family.no_empty_layers("channels")
    channels = channel_options(scores_LI, shape, multiple, none=no_mlp)
    experts = None
    if "expert" in units:
        inside = scores_SU if "expert channel" in units else None
        experts = expert_options(scores_SE, shape, inside, multiple)
    elif "expert channel" in units:
        experts = expert_channel_options(scores_SU, shape, multiple)
    check_feasible(
        heads if "head" in units else None,
        channels if "channel" in units else None,
        shape if request.max_params is None else written,
        request.budget,
        request.layout,
        session.source.family.stock_accepts(shape),
        breadth=breadth,
        latency=latency,
        tensor_parallel=request.tp,
        experts=experts,
    )


def scenario_record(scenario: Scenario, text: ScenarioText | None = None) -> dict[str, Any]:
    """Which scenario decided, and how much of it was read, for plan.json."""
    _, held_out = scenario.split()
    return {
        "name": scenario.name,
        "sha256": scenario.sha256,
        "prompts": len(scenario.conversations),
        "held_out": len(held_out),
        **answers_record(scenario),
        **({} if text is None else {"tokens": text.to_dict()}),
    }


def answers_record(scenario: Scenario) -> dict[str, Any]:
    """Which file answered prompts of a scenario, and how many, for plan.json; empty where none."""
    return {} if scenario.answers is None else {"answers": asdict(scenario.answers)}


def artifacts_record(artifacts: Artifacts) -> dict[str, Any]:
    """Which artifacts decided, for plan.json."""
    return {"sha256": artifacts.sha256, "domains": list(artifacts.domains)}


def requested_mixing(artifacts: Artifacts | None, request: PlanRequest) -> Mixing:
    """How domains and the scenario's own text are mixed: as requested, else as the artifacts record
    to be best on validation text, else as it was best for the default model.
    """
    shrinkage = DOMAIN_SHRINKAGE if artifacts is None else artifacts.shrinkage
    weight = SCENARIO_WEIGHT if artifacts is None else artifacts.scenario_weight
    return Mixing(
        shrinkage if request.shrinkage is None else request.shrinkage,
        weight if request.adapt else 0.0,
    )


def scoring_for(
    session: Session,
    artifacts: Artifacts,
    parts: Sequence[WeightedTexts],
    request: PlanRequest,
    breadth: float | None = None,
    latency: LatencyTable | None = None,
    *,
    whitelist: bool = True,
    budget: Budget | None = None,
) -> Scoring:
    """How the request wants units scored for the text of `parts`, within a budget; without one,
    within the request's."""
    shape = session.source.shape
    removed = 1 - _kept_share(budget or request.budget, shape, breadth, latency)
    return Scoring(
        session,
        artifacts,
        tuple(parts),
        request.criterion_for(session, artifacts, removed),
        request.units,
        forced_heads(artifacts.whitelist if whitelist else (), shape),
        request.comparable,
        removed,
        request.width_multiple,
        request.seed,
        ragged=request.layout == "ragged",
        empty=empty_layers(session.source, request),
    )


def _kept_share(
    budget: Budget, shape: ModelShape, breadth: float | None, latency: LatencyTable | None
) -> float:
    """The share of what the budget limits that may stay."""
    limit = budget.limit(shape, breadth, latency)
    dense = unit_cost(shape, shape.layers, budget.units, limit.kind, limit.latency)
    return min(max(limit.cost / dense, 0.0), 1.0)


def _published(
    session: Session, artifacts: Artifacts, scenario: Scenario, request: PlanRequest
) -> tuple[tuple[LayerPlan, ...], dict[str, Any]]:
    """SubspacePath Pruner's released online algorithm, and the layers around its mask."""
    shape = session.source.shape
    assert request.strength is not None
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
    (read,) = token_texts(session.tokenizer, [text])
    batches = token_batches(session.tokenizer, [read.beginning(_PUBLISHED_TOKENS)])
    observe(session.reader, session.source.family, batches, [means])
    logits = np.einsum("ld,lkd->lk", means.values[0], artifacts.weight) + artifacts.bias
    probabilities: FloatArray = 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))
    return probabilities


def plan_tensors(session: Session, compiled: Plan) -> list[dict[str, Sequence[Any]]]:
    """Every tensor that slicing changes and that stays: name, old and new shape."""
    shape, family = session.source.shape, session.source.family
    return [
        {"name": old.name, "dense": old.shape, "slim": new.shape}
        for new, old in kept_tensors(family, shape, compiled)
        if old.shape != new.shape
    ]
