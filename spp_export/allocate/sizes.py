"""A size for every layer: what sizes cost, and the choice that is worth most within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spp_export.allocate.channels import ChannelOptions
from spp_export.allocate.heads import Options, regular_sizes
from spp_export.allocate.scores import IntArray
from spp_export.knapsack import Choice, FloatArray, choose
from spp_export.shape import ModelShape

CostKind = Literal["parameters", "kv-bytes"]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The sizes of one kind of unit in every layer: their worth and cost, both [L,O]."""

    value: FloatArray
    cost: FloatArray | IntArray

    @classmethod
    def of_heads(cls, options: Options, costs: ArrayLike) -> Candidates:
        """Size (a groups of b heads) at (a-1)*g + b-1. costs: [G,g] or [L,G,g], positive integers
        (`head_costs`) or floats (a latency table)."""
        value = options.value
        flat = (len(value), value[0].size)
        return cls(value.reshape(flat), np.broadcast_to(costs, value.shape).reshape(flat))

    @classmethod
    def of_channels(cls, options: ChannelOptions, costs: ArrayLike) -> Candidates:
        """Width `options.widths[i]` at i. costs: [W] or [L,W], as for heads."""
        return cls(options.value, np.broadcast_to(costs, options.value.shape))


def head_costs(shape: ModelShape, kind: CostKind) -> IntArray:
    """Cost [G,g] of a layer with a groups of b query heads at [a-1,b-1], in parameters of q, k, v
    and o or in bytes of KV cache per token."""
    groups, heads = regular_sizes(shape.kv_heads, shape.group_size)
    if kind == "parameters":
        return groups * (heads * shape.query_head_parameters + shape.kv_head_parameters)
    return groups * (2 * shape.head_dim * shape.element_bytes) * np.ones_like(heads)


def width_costs(shape: ModelShape, widths: Sequence[int]) -> IntArray:
    """Cost [W] of a layer of every width, in parameters of gate, up and down."""
    return np.array(widths, dtype=np.int64) * shape.channel_parameters


def smallest_cost(candidates: Sequence[Candidates]) -> int:
    """Total cost of the smallest sizes that there are."""
    return sum(
        int(np.where(kind.value > -np.inf, kind.cost, np.inf).min(axis=1).sum())
        for kind in candidates
    )


def allocate(
    candidates: Sequence[Candidates], budget: float
) -> tuple[tuple[IntArray, ...], Choice]:
    """The sizes with the most worth in `budget`: for each of `candidates` one [L] of indices.

    A layer's heads and its channels are classes of their own in one knapsack, so they compete for
    the budget. Exact; raises BudgetError where the smallest sizes exceed the budget.
    """
    options = max(kind.value.shape[1] for kind in candidates)
    value = np.concatenate([_padded(kind.value, options, -np.inf) for kind in candidates])
    # What such an option would cost does not matter, but it has to be a cost like the others.
    cost = np.concatenate([_padded(kind.cost, options, 1) for kind in candidates])
    choice = choose(value, cost, budget)
    ends = np.cumsum([len(kind.value) for kind in candidates])
    return tuple(np.split(choice.options, ends[:-1])), choice


def _padded(rows: NDArray[Any], columns: int, fill: float) -> NDArray[Any]:
    return np.pad(rows, ((0, 0), (0, columns - rows.shape[1])), constant_values=fill)
