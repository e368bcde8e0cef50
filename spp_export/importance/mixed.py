"""Scores of heads or channels by a criterion, mixed over a scenario's calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np

from spp_export.calibration.mixture import WeightedTexts, gather_collections
from spp_export.calibration.moments import Collection, expert_columns, layer_weights
from spp_export.calibration.statistics import ExpertColumns, LayerWeights
from spp_export.common.arrays import FloatArray
from spp_export.common.errors import UsageError
from spp_export.data.artifacts import Artifacts
from spp_export.importance.base import Criterion, Need, ScoredUnit, statistics_read
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.session import Session
from spp_export.models.shape import Units

_UNITS: dict[ScoredUnit, Units] = {
    "head": "heads",
    "channel": "channels",
    "expert": "experts",
    "expert channel": "channels",
}
# Scores of one layer by one part of the text. The layer's weights are read once for all parts, and
# not at all where the artifacts hold every score.
_Weights = Callable[[], tuple[LayerWeights, ExpertColumns | None]]
_Score = Callable[[int, _Weights], FloatArray]


def mixed_scores(
    session: Session,
    artifacts: Artifacts,
    parts: Sequence[WeightedTexts],
    criterion: Criterion,
    unit: ScoredUnit,
    *,
    seed: int = 0,
) -> FloatArray:
    """`score(l,u) = sum_k s_k I(l,u,k)`, s the weights of the parts: [L,H], [L,I], [L,E] or, of the
    channels of experts, [L,E*F] float64, zero where a layer has no such units.

    A domain's scores are the artifacts' where they hold them; the rest is computed from statistics
    that are gathered once. Raises UsageError for a criterion of domains where there are none.
    """
    check_domain_scores(artifacts, criterion, unit)
    source, scored = session.source, _scored_parts(parts, criterion)
    held = [_held_scores(artifacts, part, f"{unit}/{criterion.name}") for part in scored]
    missing = [part for part, scores in zip(scored, held, strict=True) if scores is None]
    kinds = statistics_read(criterion.needs, _UNITS[unit], source.shape)
    gathered = iter(
        gather_collections(session, missing, kinds) if kinds else [Collection({})] * len(missing)
    )
    weighted = [
        (
            part.weight,
            _computed(session, next(gathered), criterion, unit, seed)
            if scores is None
            else partial(_held_layer, scores),
        )
        for part, scores in zip(scored, held, strict=True)
    ]
    total = sum(weight for weight, _ in weighted)
    rows = []
    has, units = {
        "head": (source.shape.has_heads, source.shape.query_heads),
        "channel": (source.shape.has_channels, source.shape.channels),
        "expert": (source.shape.sparse, source.shape.experts),
        "expert channel": (
            source.shape.sparse,
            source.shape.experts * source.shape.expert_channels,
        ),
    }[unit]
    for layer in range(source.shape.num_layers):
        if not has[layer]:
            rows.append(np.zeros(units))
            continue
        weights = cache(partial(_weights, source, layer, unit))
        shares = [weight / total * score(layer, weights).ravel() for weight, score in weighted]
        rows.append(np.sum(shares, axis=0))
    return np.stack(rows)


def check_domain_scores(artifacts: Artifacts, criterion: Criterion, unit: ScoredUnit) -> None:
    """UsageError for a criterion of domains, whose axes probes alone know, where the artifacts hold
    no scores by it or no text."""
    if Need.AXIS not in criterion.needs:
        return
    if not any(name in artifacts.domains for name, _ in artifacts.calibration):
        raise UsageError(
            f"--criterion {criterion.name}: it is defined for domains, and the artifacts hold none "
            "with text. Use another criterion."
        )
    if (name := f"{unit}/{criterion.name}") not in artifacts.importance:
        raise UsageError(
            f"--criterion {criterion.name}: the artifacts hold no {name}. Make them again with "
            f"'spp probe --criteria {criterion.name}'."
        )


def _scored_parts(parts: Sequence[WeightedTexts], criterion: Criterion) -> Sequence[WeightedTexts]:
    if not criterion.needs:  # of text: the weights say the same to all of it
        return [WeightedTexts((), 1.0)]
    # A probe axis belongs to a domain; the scenario's own prompts have none.
    return [part for part in parts if part.domain or Need.AXIS not in criterion.needs]


def _held_scores(artifacts: Artifacts, part: WeightedTexts, name: str) -> FloatArray | None:
    """Scores [L,U] of a domain that artifacts hold by this name."""
    held = artifacts.importance.get(name)
    if part.domain is None or held is None:
        return None
    scores: FloatArray = held[artifacts.domains.index(part.domain)].astype(np.float64)
    return scores


def _held_layer(scores: FloatArray, layer: int, _: _Weights) -> FloatArray:
    row: FloatArray = scores[layer]
    return row


def _computed(
    session: Session, collection: Collection, criterion: Criterion, unit: ScoredUnit, seed: int
) -> _Score:
    by_unit = {
        "head": criterion.heads,
        "channel": criterion.channels,
        "expert": criterion.experts,
        "expert channel": criterion.expert_channels,
    }
    score_of = by_unit[unit]
    assert score_of is not None, f"{criterion.name} says nothing of experts"

    def score(layer: int, weights: _Weights) -> FloatArray:
        of_layer, columns = weights()
        seen = collection.layer_statistics(session.source, layer, weights=of_layer, seed=seed)
        return score_of(replace(seen, expert_columns=columns))

    return score


def _weights(
    source: Checkpoint, layer: int, unit: ScoredUnit
) -> tuple[LayerWeights, ExpertColumns | None]:
    """What criteria read of a layer's weights to score such units."""
    columns = expert_columns(source, layer) if unit == "expert channel" else None
    return layer_weights(source, layer), columns
