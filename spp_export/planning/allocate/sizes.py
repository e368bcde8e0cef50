"""A size for every layer: what sizes cost, and the choice that is worth most within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spp_export.common.arrays import FloatArray, IntArray
from spp_export.models.shape import ModelShape
from spp_export.planning.allocate.channels import ChannelOptions
from spp_export.planning.allocate.heads import Options, regular_sizes
from spp_export.planning.knapsack import Choice, choose
from spp_export.planning.latency import LatencyTable

CostKind = Literal["parameters", "kv-bytes", "latency"]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The sizes of one kind of unit in every layer: their worth and cost, both [L,O]."""

    value: FloatArray
    cost: FloatArray | IntArray

    @classmethod
    def of_heads(cls, options: Options, costs: ArrayLike) -> Candidates:
        """Size of a groups and a count n of heads at (a-1)*N + n-1. costs: [G,N] or [L,G,N],
        positive integers (`head_costs`) or floats."""
        value = options.value
        flat = (len(value), value[0].size)
        return cls(value.reshape(flat), np.broadcast_to(costs, value.shape).reshape(flat))

    @classmethod
    def of_channels(cls, options: ChannelOptions, costs: ArrayLike) -> Candidates:
        """Width `options.widths[i]` at i. costs: [W] or [L,W], as for heads."""
        return cls(options.value, np.broadcast_to(costs, options.value.shape))


def head_costs(
    shape: ModelShape,
    kind: CostKind,
    query_heads: IntArray | None = None,
    latency: LatencyTable | None = None,
) -> IntArray:
    """Cost of every size of a layer, in parameters of q, k, v and o, in bytes of KV cache per token
    or in nanoseconds of an attention block: [G,g] of a groups of b query heads each, or [G,N] where
    `query_heads` [G,N] says how many of them a groups have.

    latency: the table of the nanoseconds, which is needed for these and knows regular sizes only.
    """
    groups, heads = regular_sizes(shape.kv_heads, shape.group_size)
    query_heads = groups * heads if query_heads is None else query_heads
    if kind == "parameters":
        return query_heads * shape.query_head_parameters + groups * shape.kv_head_parameters
    if kind == "latency":
        assert latency is not None, "a cost in time needs a table"
        return latency.attention_cost(query_heads, groups)
    return groups * (2 * shape.head_dim * shape.element_bytes) * np.ones_like(query_heads)


def width_costs(
    shape: ModelShape, widths: Sequence[int], latency: LatencyTable | None = None
) -> IntArray:
    """Cost [W] of a layer of every width, in parameters of gate, up and down, or with a table in
    nanoseconds of an MLP block."""
    if latency is not None:
        return latency.mlp_cost(widths)
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
