"""Importance of every unit for every domain, by the criteria asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spp_export.calibration.moments import Collection, layer_weights
from spp_export.common.errors import UsageError
from spp_export.domains.head_writes import FloatArray
from spp_export.importance import CRITERIA, Axis, Criterion, Need
from spp_export.models.checkpoint.source import Source

DEFAULT_CRITERIA = ("energy", "axis")
UNITS = ("heads", "both")


def criteria_named(names: Sequence[str]) -> tuple[Criterion, ...]:
    """The criteria of these names, each once; UsageError for a name that is none."""
    for name in names:
        if name not in CRITERIA:
            raise UsageError(f"--criteria {name}: expected some of {', '.join(CRITERIA)}.")
    if not names:
        raise UsageError("--criteria: expected at least one name.")
    return tuple(CRITERIA[name] for name in dict.fromkeys(names))


def kinds_needed(criteria: Sequence[Criterion], units: str) -> tuple[str, ...]:
    """Kinds of statistics to gather; those of attention always, as every export re-fits by them."""
    needs = {need for criterion in criteria for need in criterion.needs}
    kinds = ["attention"]
    if units == "both" and Need.ACTIVATIONS in needs:
        kinds.append("mlp")
    if Need.GRADIENTS in needs:
        kinds.append("gradients")
    return tuple(kinds)


def score_units(
    source: Source,
    collections: Sequence[Collection],
    criteria: Sequence[Criterion],
    units: str,
    directions_LKd: FloatArray,
    shares_KLH: FloatArray,
    seed: int,
) -> Mapping[str, FloatArray]:
    """Float32 `head/<criterion>` [K,L,H] and, for units "both", `channel/<criterion>` [K,L,I].

    `directions_LKd` are the domains' probe axes, of unit length, and `shares_KLH` the heads'
    shares along them.
    """
    shape = source.shape
    domains, layers = len(collections), shape.num_layers
    scores = {
        f"head/{one.name}": np.zeros((domains, layers, shape.query_heads), np.float32)
        for one in criteria
    }
    if units == "both":
        size = (domains, layers, shape.channels)
        scores |= {f"channel/{one.name}": np.zeros(size, np.float32) for one in criteria}
    for layer in range(layers):
        weights = layer_weights(source, layer)
        for k, collection in enumerate(collections):
            axis = Axis(directions_LKd[layer, k], shares_KLH[k, layer])
            seen = collection.layer_statistics(source, layer, weights=weights, axis=axis, seed=seed)
            for one in criteria:
                scores[f"head/{one.name}"][k, layer] = one.heads(seen)
                if units == "both":
                    scores[f"channel/{one.name}"][k, layer] = one.channels(seen)
    return scores
