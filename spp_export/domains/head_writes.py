"""How much of each head's write lies along the probe axis of its domain, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from spp_export.models.checkpoint.reader import read_float
from spp_export.models.checkpoint.source import Source

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]

_EPS = 1e-6


class AxisShares:
    """Sums over tokens of (u . w)^2 / (||w||^2 + eps), w a head's write and u the domain's axis.

    `||Wo_h a_h||^2 = a_h^T G_h a_h` with `G_h = Wo_h^T Wo_h` [dh,dh], so no write is materialised.
    Tokens count for `self.domain`, which the caller sets.
    """

    place = "output"

    def __init__(self, source: Source, device: torch.device, axes_LKd: FloatArray) -> None:
        shape, family = source.shape, source.family
        heads, dim = shape.query_heads, shape.head_dim
        self.domain = 0
        self.directions = axes_LKd / np.linalg.norm(axes_LKd, axis=2, keepdims=True).clip(min=1e-12)
        self._gram: list[Tensor] = []
        self._along: list[Tensor] = []
        for layer in range(shape.num_layers):
            # From the files: a model spread over devices may not have its weights at hand.
            stored = source.tensors[f"{family.layer_name(layer, family.output)}.weight"]
            weight = torch.from_numpy(read_float(stored)).float().view(-1, heads, dim).to(device)
            axes = torch.from_numpy(self.directions[layer]).to(weight)
            self._gram.append(torch.einsum("ohi,ohj->hij", weight, weight))
            self._along.append(torch.einsum("ko,ohi->khi", axes, weight))
        domains = axes_LKd.shape[1]
        self._sums = torch.zeros((domains, shape.num_layers, heads), dtype=torch.float64)
        self._tokens = torch.zeros(domains, dtype=torch.float64)

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Add one batch of o_proj inputs [T,H*dh], all of `self.domain`."""
        gram, along = (part[layer].to(values.device) for part in (self._gram, self._along))
        values_HTi = values.float().view(values.shape[0], gram.shape[0], -1).transpose(0, 1)
        energy_TH = ((values_HTi @ gram) * values_HTi).sum(2).clamp(min=0).T
        along_HT = torch.einsum("hti,hi->ht", values_HTi, along[self.domain])
        share_TH = along_HT.T.square() / (energy_TH + _EPS)
        self._sums[self.domain, layer] += share_TH.double().sum(0).cpu()
        if layer == 0:
            self._tokens[self.domain] += len(share_TH)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens seen of each domain [K]."""
        return tuple(int(n) for n in self._tokens)

    def shares(self) -> FloatArray:
        """Averages over each domain's tokens [K,L,H]."""
        result: FloatArray = (self._sums / self._tokens.clamp(min=1)[:, None, None]).numpy()
        return result
