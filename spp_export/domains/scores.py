"""Importance of every unit for every domain, by the criteria asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from spp_export.calibration.activations import Observer, input_device
from spp_export.calibration.moments import Collection, layer_weights
from spp_export.calibration.statistics import Axis
from spp_export.common.arrays import FloatArray
from spp_export.common.errors import UsageError
from spp_export.importance import SCORING
from spp_export.importance.base import Criterion, statistics_read
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.session import Session
from spp_export.models.shape import ModelShape

DEFAULT_CRITERIA = ("energy", "axis")
UNITS = ("heads", "both")
_EPS = 1e-6


def criteria_named(names: Sequence[str]) -> tuple[Criterion, ...]:
    """The criteria of these names, each once; UsageError for a name that is none."""
    for name in names:
        if name not in SCORING:
            raise UsageError(f"--criteria {name}: expected some of {', '.join(SCORING)}.")
    if not names:
        raise UsageError("--criteria: expected at least one name.")
    return tuple(SCORING[name] for name in dict.fromkeys(names))


def kinds_needed(criteria: Sequence[Criterion], units: str, shape: ModelShape) -> tuple[str, ...]:
    """Kinds of statistics to gather; those of attention always, as every export re-fits by them."""
    needs = {need for criterion in criteria for need in criterion.needs}
    read = statistics_read(needs, "both" if _of_mlps(units, shape) else "heads", shape)
    return tuple(dict.fromkeys(("attention", *read)))


def score_units(
    source: Checkpoint,
    collections: Sequence[Collection],
    criteria: Sequence[Criterion],
    units: str,
    directions_LKd: FloatArray,
    shares_KLH: FloatArray,
    seed: int,
) -> Mapping[str, FloatArray]:
    """Float32 `head/<criterion>` [K,L,H] and, for units "both", `channel/<criterion>` [K,L,I];
    channels of experts are scored when a plan asks for them.

    `directions_LKd` are the domains' probe axes, of unit length, and `shares_KLH` the heads'
    shares along them.
    """
    shape = source.shape
    domains, layers = len(collections), shape.num_layers
    scores = {
        f"head/{criterion.name}": np.zeros((domains, layers, shape.query_heads), np.float32)
        for criterion in criteria
    }
    if _of_mlps(units, shape):
        size = (domains, layers, shape.channels)
        scores |= {
            f"channel/{criterion.name}": np.zeros(size, np.float32) for criterion in criteria
        }
    for layer in range(layers):
        weights = layer_weights(source, layer)
        for k, collection in enumerate(collections):
            axis = Axis(directions_LKd[layer, k], shares_KLH[k, layer])
            seen = collection.layer_statistics(source, layer, weights=weights, axis=axis, seed=seed)
            for criterion in criteria:
                if shape.has_heads[layer]:
                    scores[f"head/{criterion.name}"][k, layer] = criterion.heads(seen)
                if _of_mlps(units, shape) and shape.has_channels[layer]:
                    scores[f"channel/{criterion.name}"][k, layer] = criterion.channels(seen)
    return scores


def _of_mlps(units: str, shape: ModelShape) -> bool:
    return units == "both" and not shape.expert_channels


class AxisShares(Observer):
    """Sums over tokens of (u . w)^2 / (||w||^2 + eps), w a head's write and u the axis of the
    domain that the text is of, `domain_N`; a batch is of one domain.

    `||Wo_h a_h||^2 = a_h^T G_h a_h` with `G_h = Wo_h^T Wo_h` [dh,dh], so no write is materialised.
    """

    place = "output"

    def __init__(
        self,
        source: Checkpoint,
        device: torch.device,
        axes_LKd: FloatArray,
        domain_N: Sequence[int],
    ) -> None:
        shape, family = source.shape, source.family
        heads, dim = shape.query_heads, shape.head_dim
        self.directions = axes_LKd / np.linalg.norm(axes_LKd, axis=2, keepdims=True).clip(min=1e-12)
        self._axes, self._domain = axes_LKd, domain_N
        self._gram: dict[int, Tensor] = {}
        self._along: dict[int, Tensor] = {}
        for layer in range(shape.num_layers):
            if not shape.has_heads[layer]:
                continue
            # From the files: a model spread over devices may not have its weights at hand.
            stored = source.weight(family.output, layer)
            weight = torch.from_numpy(stored).float().view(-1, heads, dim).to(device)
            axes = torch.from_numpy(self.directions[layer]).to(weight)
            self._gram[layer] = torch.einsum("ohi,ohj->hij", weight, weight)
            self._along[layer] = torch.einsum("ko,ohi->khi", axes, weight)
        domains = axes_LKd.shape[1]
        self._sums = torch.zeros((shape.num_layers, domains, heads), dtype=torch.float64)
        self._tokens = torch.zeros(domains, dtype=torch.float64)
        self._first = shape.has_heads.index(True)

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Add one batch of o_proj inputs [T,H*dh]."""
        domain = self._domain[int(text_T[0])]
        gram, along = (part[layer].to(values.device) for part in (self._gram, self._along))
        values_HTi = values.float().view(values.shape[0], gram.shape[0], -1).transpose(0, 1)
        energy_TH = ((values_HTi @ gram) * values_HTi).sum(2).clamp(min=0).T
        along_HT = torch.einsum("hti,hi->ht", values_HTi, along[domain])
        share_TH = along_HT.T.square() / (energy_TH + _EPS)
        self._sums[layer, domain] += share_TH.double().sum(0).cpu()
        if layer == self._first:
            self._tokens[domain] += len(share_TH)

    def taken(self, layer: int) -> Iterable[Tensor]:
        """As of `Observer`."""
        return [self._sums[layer], *([self._tokens] if layer == self._first else [])]

    def recipe(self) -> dict[str, Any]:
        """As of `Observer`."""
        return {"axes_LKd": self._axes, "domain_N": self._domain}

    @classmethod
    def made(cls, session: Session, recipe: Mapping[str, Any]) -> Self:
        """As of `Observer`."""
        return cls(session.source, input_device(session.reader), **recipe)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens seen of each domain [K]."""
        return tuple(int(n) for n in self._tokens)

    def shares(self) -> FloatArray:
        """Averages over each domain's tokens [K,L,H]."""
        means = self._sums / self._tokens.clamp(min=1)[None, :, None]
        result: FloatArray = means.transpose(0, 1).numpy()
        return result
