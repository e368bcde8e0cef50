"""Text and criterion to the worth of every size of every layer: what allocation chooses from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spp_export.calibration.cache import LOSS
from spp_export.calibration.mixture import WeightedTexts, gather_parts
from spp_export.calibration.moments import Moments
from spp_export.common.arrays import BoolArray, FloatArray
from spp_export.common.errors import UsageError
from spp_export.common.progress import progress
from spp_export.data.artifacts import Artifacts
from spp_export.importance import CRITERIA, SCORING
from spp_export.importance.base import (
    Criterion,
    Need,
    ScoredUnit,
    SetCriterion,
    check_convention,
    scored_units,
    statistics_read,
    unit_statistics,
)
from spp_export.importance.comparable import LOSSES, comparable_kinds, stream
from spp_export.importance.mixed import check_domain_scores, mixed_scores
from spp_export.models.session import Session
from spp_export.models.shape import Units, channel_widths
from spp_export.planning.allocate.options import (
    ExpertOptions,
    NestedOptions,
    Options,
    SetOptions,
    channel_options,
    expert_channel_options,
    expert_options,
    layer_options,
    per_parameter,
    ragged_options,
    with_nothing,
)

# Their scores come from a pass over the scenario through layers already pruned.
SEQUENTIAL = {"pp-scenario": False, "full-batch-probing-scenario": True}
CRITERION_NAMES = (*CRITERIA, *SEQUENTIAL)
_OF_EXPERTS: tuple[ScoredUnit, ...] = ("expert", "expert channel")
_STATISTICS: dict[ScoredUnit, str] = {"expert": "experts", "expert channel": "expert channels"}
# `obs` assumes that what stays is re-fitted; without that, energy is the better guide.
DEFAULT_CRITERION = {"lstsq": "obs", "bias": "energy", "none": "energy"}
# `fisher` expands the loss around the dense model. On the default model it chose better than `obs`
# while no more than this was removed, and worse beyond (docs/choices.md).
_MOST_REMOVED = 0.3


def default_criterion(
    session: Session,
    artifacts: Artifacts,
    compensation: str,
    answer_tokens: int,
    removed: float = 0.0,
    units: Units = "heads",
) -> str:
    """The criterion where none is named: `fisher` rather than `obs` where a moderate share is
    `removed` and gradients are at hand, those of the pools in the artifacts and those of the
    scenario by a backward pass. Of experts alone, or their channels, nothing is re-fitted, and
    `fisher` knows none."""
    scored = set(scored_units(units, session.source.shape))
    inside, of_experts = "expert channel" in scored, scored <= set(_OF_EXPERTS)
    usual = "energy" if of_experts else DEFAULT_CRITERION[compensation]
    if inside or "expert" in scored:
        return usual
    known = artifacts.dialogues and all(one.gradients is not None for one in artifacts.dialogues)
    # Spread over devices, some weights may have none.
    in_memory = session.device != "auto" and not session.reads_from_disk
    at_hand = known and in_memory and answer_tokens > 0
    # Shares of budgets are quotients, which round.
    moderate = removed <= _MOST_REMOVED + 1e-6
    return "fisher" if usual == "obs" and at_hand and moderate else usual


def _for_experts(name: str, unit: ScoredUnit = "expert") -> str:
    """The criterion that scores experts, or their channels, where this one decides. Raises
    UsageError where none does."""
    criterion = CRITERIA.get(name)
    if isinstance(criterion, SetCriterion) and criterion.experts:
        return criterion.experts
    if criterion is not None and _knows_experts(criterion, unit):
        return name
    known = [other for other in CRITERIA if other != name and _knows_experts(CRITERIA[other], unit)]
    what = "experts" if unit == "expert" else "the channels of experts"
    raise UsageError(
        f"--criterion {name}: it says nothing of {what}. Use {', '.join(known)}, or --units heads."
    )


def _knows_experts(criterion: Criterion | SetCriterion, unit: ScoredUnit) -> bool:
    if unit == "expert" or isinstance(criterion, SetCriterion):
        return criterion.experts is not None
    return criterion.expert_channels is not None


def check_criterion(session: Session, artifacts: Artifacts, name: str, units: Units) -> None:
    """UsageError where this model or these artifacts cannot be scored by a criterion, ModelError
    where it does not know what the family computes, before anything is gathered for it."""
    needs = CRITERIA[name].needs if name in CRITERIA else frozenset({Need.GRADIENTS})
    if needs & {Need.GRADIENTS, Need.LOSS} and session.reads_from_disk:
        raise UsageError(
            f"--criterion {name}: needs every weight in memory, and this model runs layer by "
            "layer. Choose another criterion, or --no-layerwise."
        )
    scored = scored_units(units, session.source.shape)
    for unit in scored:
        if unit in _OF_EXPERTS:
            from spp_export.models.routing import check_routed_writes

            _for_experts(name, unit)
            check_routed_writes()
    check_convention(session.source.family, CRITERIA.get(name))
    if name in SEQUENTIAL:
        from spp_export.importance.probe_pruning.blocks import check_family

        check_family(session.source.family)
    if name in SCORING:
        for unit in scored:
            check_domain_scores(artifacts, SCORING[name], unit)


@dataclass(frozen=True)
class UnitOptions:
    """Worth of every size of every layer's heads and channels, and of the experts, with their
    channels where both go, of layers that have any; None where all of them stay."""

    heads: Options | None
    channels: NestedOptions | None
    experts: ExpertOptions | None = None


@dataclass(frozen=True)
class Scoring:
    """How units are scored for the text of `parts`.

    comparable: one of `COMPARABLE`, or None for the criterion's own. forced: heads that stay.
    removed: the share that sequential criteria prune on their way. multiple: of channel widths.
    ragged: whether single heads may go. empty: whether a layer may lose all of its heads, or all of
    its channels.
    """

    session: Session
    artifacts: Artifacts
    parts: tuple[WeightedTexts, ...]
    criterion: str
    units: Units
    forced: BoolArray
    comparable: str | None = None
    removed: float = 0.2
    multiple: int = 64
    seed: int = 0
    ragged: bool = False
    empty: bool = False

    def options(self) -> UnitOptions:
        """What the allocator chooses from."""
        criterion = CRITERIA.get(self.criterion)
        if isinstance(criterion, SetCriterion):
            return self._set_options(criterion)
        worth, shape = self._worth(), self.session.source.shape
        heads: Options | None = None
        if "head" in worth:
            head_options = ragged_options if self.ragged else layer_options
            heads = head_options(worth["head"], shape, self.forced)
            heads = with_nothing(heads, 0.0, self.forced) if self.empty else heads
        channels = None
        if "channel" in worth:
            channels = channel_options(worth["channel"], shape, self.multiple, none=self._no_mlp)
        experts = self._expert_options(worth.get("expert"), worth.get("expert channel"))
        return UnitOptions(heads, channels, experts)

    @property
    def _no_mlp(self) -> bool:
        """Whether a layer may lose its MLP."""
        return self.empty and not self.session.source.family.no_empty_layers("channels")

    def _expert_options(
        self, experts_SE: FloatArray | None, channels_SU: FloatArray | None
    ) -> ExpertOptions | None:
        """Of experts, of their channels, or of both, as far as these may go."""
        shape = self.session.source.shape
        if experts_SE is not None:
            return expert_options(experts_SE, shape, channels_SU, self.multiple)
        if channels_SU is not None:
            return expert_channel_options(channels_SU, shape, self.multiple)
        return None

    def _worth(self) -> dict[ScoredUnit, FloatArray]:
        """Worth of units [L,U]: a loss is one by itself, other scores weigh a unit's parameters."""
        scores, how, shape = self._scores(), self.how_comparable, self.session.source.shape
        sensitivities = None
        if how == "stream":
            kinds = unit_statistics(self.units, shape)
            moments = gather_parts(self.session, self.parts, kinds)
            sensitivities = [self._sensitivity(moments, kind) for kind in kinds]
        compared = comparable_kinds(list(scores.values()), how, sensitivities)
        worth = dict(zip(scores, compared, strict=True))
        if how in LOSSES:
            return worth
        parameters: dict[ScoredUnit, float] = {
            "head": shape.query_head_parameters + shape.kv_head_parameters / shape.group_size,
            "channel": float(shape.channel_parameters),
            "expert": float(shape.counted.expert),
            "expert channel": float(shape.counted.expert_channel),
        }
        return {unit: per_parameter(of, parameters[unit]) for unit, of in worth.items()}

    @property
    def how_comparable(self) -> str:
        """The name in `COMPARABLE` that applies."""
        if self.comparable is not None:
            return self.comparable
        return CRITERIA[self.criterion].comparable if self.criterion in CRITERIA else "standardised"

    def _scores(self) -> dict[ScoredUnit, FloatArray]:
        """Scores [L,H] of heads, [L,I] of channels, and of the layers that have experts [S,E] and
        [S,E*F] of these and their channels, of the units that may go."""
        units = scored_units(self.units, self.session.source.shape)
        if self.criterion in SEQUENTIAL:
            sequential = dict(zip(("head", "channel"), self._sequential(), strict=True))
            return {unit: sequential[unit] for unit in units}
        return {unit: self._mixed(self.criterion, unit) for unit in units}

    def _mixed(self, criterion: str, unit: ScoredUnit) -> FloatArray:
        scores = mixed_scores(
            self.session, self.artifacts, self.parts, SCORING[criterion], unit, seed=self.seed
        )
        return scores[list(self.session.source.shape.sparse)] if unit in _OF_EXPERTS else scores

    def _sensitivity(self, moments: Moments, kind: str) -> FloatArray:
        """Of the layers that have units of a kind."""
        sensitivity = moments.sensitivity(kind)
        sparse = list(self.session.source.shape.sparse)
        return sensitivity[sparse] if kind in ("experts", "expert channels") else sensitivity

    def record(self) -> dict[str, Any]:
        """What decided, for plan.json."""
        record: dict[str, Any] = {"name": self.criterion}
        if not isinstance(CRITERIA.get(self.criterion), SetCriterion):
            record["comparable"] = self.how_comparable
        if self.criterion == "random":
            record["seed"] = self.seed
        return record

    def _sequential(self) -> tuple[FloatArray, FloatArray]:
        """Probe Pruning's static builds: the scenario's own prompts as the batch to come."""
        from spp_export.calibration.activations import token_batches
        from spp_export.importance.probe_pruning import scenario_scores
        from spp_export.importance.probe_pruning.history import history_of

        own = [part for part in self.parts if part.domain is None]
        if not own:
            raise UsageError(f"--criterion {self.criterion}: it reads the scenario's own text.")
        session, full = self.session, SEQUENTIAL[self.criterion]
        family, shape = session.source.family, session.source.shape
        history = None
        if not full:
            texts = [text for part in self.parts if part.domain for text in part.texts]
            history = history_of(session, texts)
        return scenario_scores(
            session.model,
            family,
            shape,
            token_batches(session.tokenizer, own[0].texts),
            ratio=self.removed,
            history=history,
            full=full,
            units=self.units,
            multiple=self.multiple,
        )

    def _set_options(self, criterion: SetCriterion) -> UnitOptions:
        """Minus the loss of every size: in units of the residual stream, or in nats."""
        shape = self.session.source.shape
        # The re-fit reads plain moments: with them here, one pass gathers all.
        needs = criterion.needs | {Need.MOMENTS}
        moments = gather_parts(self.session, self.parts, statistics_read(needs, self.units, shape))
        heads: Options | None = None
        channels: NestedOptions | None = None
        units = scored_units(self.units, shape)
        if "head" in units:
            groups = (shape.kv_heads, shape.group_size)

            def losses(layer: int, weight: FloatArray, blocks: FloatArray) -> tuple[Any, BoolArray]:
                """At every size, and last with no heads; and the heads kept at every size."""
                forced = self.forced[layer].reshape(groups)
                lost, kept = criterion.heads(weight, blocks[0], forced, ragged=self.ragged)
                return np.append(lost, criterion.attention(weight, blocks[0])), kept

            worth, sets = self._weighed("heads", moments, criterion, losses)
            sizes = worth[:, :-1].reshape(sets.shape[:3])
            heads = SetOptions(sizes, sets, ragged=self.ragged)
            heads = with_nothing(heads, worth[:, -1], self.forced) if self.empty else heads
        if "channel" in units:
            worth, places = self._weighed(
                "channels",
                moments,
                criterion,
                lambda _, weight, blocks: criterion.channels(
                    weight, blocks, self.multiple, none=self._no_mlp
                ),
            )
            widths = channel_widths(shape.channels, self.multiple, none=self._no_mlp)
            channels = NestedOptions(widths, worth, places)
        of_experts: dict[ScoredUnit, FloatArray] = {
            unit: stream(
                self._mixed(_for_experts(self.criterion, unit), unit),
                self._sensitivity(moments, _STATISTICS[unit]),
            )
            for unit in _OF_EXPERTS
            if unit in units
        }
        experts = self._expert_options(of_experts.get("expert"), of_experts.get("expert channel"))
        return UnitOptions(heads, channels, experts)

    def _weighed(
        self,
        units: Literal["heads", "channels"],
        moments: Moments,
        criterion: SetCriterion,
        weigh: Callable[..., tuple[FloatArray, Any]],
    ) -> tuple[FloatArray, Any]:
        """Worth [L,...] of all sizes and what is kept at each, of a consumer of all layers.

        `weigh` gives the losses of one layer from its number, the consumer's weight and the second
        moments of its input.
        """
        source, kind = self.session.source, {"heads": "attention", "channels": "mlp"}[units]
        module = source.family.output if units == "heads" else source.family.down
        if Need.LOSS in criterion.needs:
            kind += LOSS
            sensitivity: FloatArray = np.ones(source.shape.num_layers)
        else:
            sensitivity = moments.sensitivity(kind)
        has = source.shape.has_heads if units == "heads" else source.shape.has_channels
        rows: list[tuple[FloatArray, Any]] = []
        with progress(f"weighing {units}", source.shape.num_layers) as advance_to:
            for layer in range(source.shape.num_layers):
                if has[layer]:
                    weight, blocks = source.weight(module, layer), moments.blocks(kind, layer)
                    losses, units_kept = weigh(layer, weight, blocks)
                    rows.append((-losses * sensitivity[layer], units_kept))
                advance_to(layer + 1)
        # Of layers without such units nothing is read.
        worth, kept = (_spread(np.stack(of), has) for of in zip(*rows, strict=True))
        return worth, kept


def _spread(rows: NDArray[Any], has: Sequence[bool]) -> NDArray[Any]:
    """Rows of the layers that `has` names, among zeros for the others."""
    whole = np.zeros((len(has), *rows.shape[1:]), rows.dtype)
    whole[np.array(has)] = rows
    return whole
