"""How much a scenario's own domains should count in the re-fit, chosen on validation text.

A re-fit from one domain's moments knows that domain best and has the least text; one from all
domains has more text and fits each less. What is best is measured: o_proj is re-fitted at a fixed
set of kept heads from the training moments of a mixture, and what it loses is measured on
validation text that had no part in it. The same for the weight of a scenario's own text, with one
half of a domain's validation text standing for the scenario and the other half judging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spp_export.calibration.activations import Observer
from spp_export.calibration.refit import refit, residual
from spp_export.common.arrays import FloatArray, IndexArray

SHRINKAGES = (0.0, 0.25, 0.5, 0.75, 1.0)
SCENARIO_WEIGHTS = (0.0, 0.15, 0.3, 0.5)
KEEP = 0.8
_MOST_LAYERS, _FEWEST_LAYERS = 8, 2
# Inputs of o_proj from which fewer layers are measured, as a re-fit costs their cube.
_WIDE = 1024


@dataclass(frozen=True)
class LayerCase:
    """One layer: o_proj [d,m], second moments of its input [m,m], and the inputs kept.

    train [K,m,m]: of the training text. own, judged [K,m,m]: of both halves of the validation text.
    """

    weight: FloatArray
    train: FloatArray
    own: FloatArray
    judged: FloatArray
    kept: IndexArray


def sampled_layers(layers: Sequence[int], width: int) -> tuple[int, ...]:
    """At most eight evenly spaced ones of these layers, down to two where o_proj reads many inputs
    (`width`)."""
    affordable = max(_FEWEST_LAYERS, min(_MOST_LAYERS, _MOST_LAYERS * _WIDE // width))
    places = np.linspace(0, len(layers) - 1, min(affordable, len(layers))).round()
    return tuple(layers[int(place)] for place in np.unique(places))


def strongest(energy_KLH: FloatArray, layer: int, head_dim: int) -> IndexArray:
    """Inputs of o_proj that belong to the KEEP heads of highest energy, the mean over domains."""
    mean_H = energy_KLH[:, layer].mean(axis=0)
    count = max(1, round(KEEP * len(mean_H)))
    heads = np.sort(np.argsort(-mean_H, kind="stable")[:count])
    elements: IndexArray = (heads[:, None] * head_dim + np.arange(head_dim)).reshape(-1)
    return elements


def choose_shrinkage(
    case: Callable[[int], LayerCase],
    layers: Sequence[int],
    advance_to: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """The shrinkage and the scenario's weight that lose least, as the manifest keeps them.

    `case` gives a layer's text and weights, and is asked twice. Losses are the share of o_proj's
    output energy lost (`refit.residual`), the mean over domains and layers. A scenario weight
    is chosen at the shrinkage that was. Ties go to the greater shrinkage and the smaller weight,
    which follow the scenario less.
    """
    shrunk = np.zeros(len(SHRINKAGES))
    weighed = np.zeros(len(SCENARIO_WEIGHTS))
    for done, layer in enumerate(layers, start=1):
        at = case(layer)
        both = (at.own + at.judged) / 2
        for i, shrinkage in enumerate(SHRINKAGES):
            shrunk[i] += _lost(at, _mixtures(at.train, shrinkage), both) / len(layers)
        advance_to(done)
    best = SHRINKAGES[len(shrunk) - 1 - int(shrunk[::-1].argmin())]
    for done, layer in enumerate(layers, start=len(layers) + 1):
        at = case(layer)
        pools = _mixtures(at.train, best)
        for i, weight in enumerate(SCENARIO_WEIGHTS):
            mixed = (1 - weight) * pools + weight * at.own
            weighed[i] += _lost(at, mixed, at.judged) / len(layers)
        advance_to(done)
    how = {"layers": list(layers), "keep": KEEP, "measure": "share of o_proj's output energy lost"}
    return {
        "shrinkage": {"chosen": best, "loss": _named(SHRINKAGES, shrunk), **how},
        "scenario_weight": {
            "chosen": SCENARIO_WEIGHTS[int(weighed.argmin())],
            "loss": _named(SCENARIO_WEIGHTS, weighed),
            **how,
        },
    }


def _mixtures(train_Kmm: FloatArray, shrinkage: float) -> FloatArray:
    """Moments for each domain: its own, shrunk towards the mean of all [K,m,m]."""
    even = train_Kmm.mean(axis=0)
    mixed: FloatArray = shrinkage * even + (1 - shrinkage) * train_Kmm
    return mixed


def _lost(at: LayerCase, fitted_Kmm: FloatArray, judged_Kmm: FloatArray) -> float:
    losses = [
        residual(at.weight, judged, at.kept, refit(at.weight, fitted, at.kept))
        for fitted, judged in zip(fitted_Kmm, judged_Kmm, strict=True)
    ]
    return float(np.mean(losses))


def _named(values: Iterable[float], losses: FloatArray) -> dict[str, float]:
    return {f"{v:g}": round(float(loss), 8) for v, loss in zip(values, losses, strict=True)}


class GroupSeconds(Observer):
    """Second moments of o_proj's input in a few layers, of several groups of texts in one pass.

    `group_N` gives the group of each text; moments are averages over a group's tokens.
    """

    place = "output"

    def __init__(self, layers: Sequence[int], width: int, group_N: Sequence[int]) -> None:
        self._row = {layer: row for row, layer in enumerate(layers)}
        self._recipe = {"layers": list(layers), "width": width, "group_N": list(group_N)}
        self._group = torch.tensor(group_N, dtype=torch.long)
        groups = int(self._group.max()) + 1
        self._sums = torch.zeros((len(layers), groups, width, width), dtype=torch.float32)
        self._tokens = torch.zeros((len(layers), groups), dtype=torch.float64)

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Add one batch [T,m] to the groups of its texts."""
        row = self._row.get(layer)
        if row is None:
            return
        group_T = self._group.to(text_T.device)[text_T]
        for group in group_T.unique().tolist():
            part = values[group_T == group].float()
            self._sums[row, group] += (part.T @ part).cpu()
            self._tokens[row, group] += len(part)

    def taken(self, layer: int) -> Iterable[Tensor]:
        """As of `Observer`."""
        row = self._row.get(layer)
        return [] if row is None else [self._sums[row], self._tokens[row]]

    def recipe(self) -> dict[str, Any]:
        """As of `Observer`."""
        return self._recipe

    def second(self, layer: int) -> FloatArray:
        """E[a a^T] of each group [n,m,m]."""
        row = self._row[layer]
        tokens = self._tokens[row].clamp(min=1)[:, None, None]
        result: FloatArray = (self._sums[row] / tokens).float().numpy()
        return result
