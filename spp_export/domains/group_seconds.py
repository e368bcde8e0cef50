"""Second moments of groups of texts in a few layers, for choices made on validation text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]


class GroupSeconds:
    """Second moments of o_proj's input in a few layers, of several groups of texts in one pass.

    `group_N` gives the group of each text; moments are averages over a group's tokens.
    """

    place = "output"

    def __init__(self, layers: Sequence[int], width: int, group_N: Sequence[int]) -> None:
        self._row = {layer: row for row, layer in enumerate(layers)}
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

    def second(self, layer: int) -> FloatArray:
        """E[a a^T] of each group [n,m,m]."""
        row = self._row[layer]
        tokens = self._tokens[row].clamp(min=1)[:, None, None]
        result: FloatArray = (self._sums[row] / tokens).float().numpy()
        return result
