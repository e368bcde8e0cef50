"""A size for every layer: what sizes cost, and the choice that is worth most within a budget.

Layers may differ, or all have one size, which a stock config can describe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spp_export.common.arrays import BoolArray, FloatArray, IntArray
from spp_export.common.errors import BudgetError
from spp_export.models.shape import LayerShape, ModelShape, Units, includes
from spp_export.planning.allocate.options import (
    ExpertOptions,
    NestedOptions,
    Options,
    regular_sizes,
)
from spp_export.planning.knapsack import Choice, choose
from spp_export.planning.latency import LatencyTable

CostKind = Literal["parameters", "kv-bytes", "latency"]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The sizes of one kind of unit in every layer: their worth and cost, both [L,O]."""

    value: FloatArray
    cost: FloatArray | IntArray

    @classmethod
    def of_heads(
        cls, options: Options, costs: ArrayLike, has_heads: Sequence[bool] = ()
    ) -> Candidates:
        """Size of a groups and a count n of heads at (a-1)*N + n-1, and no heads, if that may be,
        at the end. costs: [G,N] or [L,G,N], positive integers (`head_costs`) or floats. A layer
        without heads in the model, by `has_heads`, has one size, the first, that costs nothing."""
        value = options.value
        flat = (len(value), value[0].size)
        worth, costs = value.reshape(flat), np.broadcast_to(costs, value.shape).reshape(flat)
        if options.nothing is not None:
            worth = np.column_stack([worth, options.nothing])
            costs = np.pad(costs, ((0, 0), (0, 1)))
        return cls._of(worth, costs, has_heads)

    @classmethod
    def nested(
        cls, options: NestedOptions, costs: ArrayLike, has_units: Sequence[bool] = ()
    ) -> Candidates:
        """Width `options.widths[i]` at i. costs: [W] or [L,W], as for heads."""
        costs = np.broadcast_to(costs, options.value.shape)
        return cls._of(options.value, costs, has_units)

    @classmethod
    def of_experts(cls, options: ExpertOptions, costs: IntArray) -> Candidates:
        """Number `options.counts[c]` of width `options.widths[w]` at c*W + w, of layers that have
        experts. costs: [C,W]."""
        flat = (len(options.value), costs.size)
        worth = options.value.reshape(flat)
        return cls(worth, np.broadcast_to(costs.ravel(), flat))

    @classmethod
    def _of(cls, value: FloatArray, cost: NDArray[Any], has_units: Sequence[bool]) -> Candidates:
        if all(has_units):
            return cls(value, cost)
        has = np.array(has_units)[:, None]
        first = np.arange(value.shape[1]) == 0
        nothing = np.where(first, 0.0, -np.inf)
        return cls(np.where(has, value, nothing), np.where(has | ~first, cost, 0))


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
    costs = shape.counted
    cached = groups * costs.kv_rows + query_heads * costs.query_rows + costs.layer_rows
    return shape.element_bytes * cached


def width_costs(
    shape: ModelShape, widths: Sequence[int], latency: LatencyTable | None = None
) -> IntArray:
    """Cost [W] of an MLP of every width, in parameters of gate, up and down, or with a table in
    nanoseconds."""
    if latency is not None:
        return latency.mlp_cost(widths)
    return np.array(widths, dtype=np.int64) * shape.channel_parameters


def expert_costs(shape: ModelShape, options: ExpertOptions, units: Units) -> IntArray:
    """Cost [C,W] of a layer of each number of experts of each width, in parameters of these and
    their rows of the router; where all experts stay by `units`, of their channels alone."""
    costs, counts = shape.counted, options.counts
    narrower = shape.expert_channels - np.array(options.widths, dtype=np.int64)
    whole = costs.expert
    if not includes(units, "experts"):
        whole = costs.expert_channel * shape.expert_channels
    each = whole - costs.expert_channel * narrower
    return np.multiply.outer(np.array(counts, dtype=np.int64), each)


def smallest_cost(candidates: Sequence[Candidates], *, some: bool = False) -> int:
    """Total cost of the smallest sizes that there are; with `some`, as of `allocate_some`."""
    costs = [np.where(kind.value > -np.inf, kind.cost, np.inf) for kind in candidates]
    least = sum(int(kind.min(axis=1).sum()) for kind in costs)
    if some:
        heads = costs[0]
        least += int((heads[:, :-1].min(axis=1) - heads.min(axis=1)).min())
    return least


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


def allocate_some(
    candidates: Sequence[Candidates], budget: float
) -> tuple[tuple[IntArray, ...], Choice]:
    """As `allocate`, where the first candidates' last option may not be the choice of every layer.

    Of the choices where one layer does without it, each layer in turn, the best.
    """
    first, *rest = candidates
    best: tuple[tuple[IntArray, ...], Choice] | None = None
    bound = -np.inf
    for layer in range(len(first.value)):
        value = first.value.copy()
        value[layer, -1] = -np.inf
        try:
            found = allocate([Candidates(value, first.cost), *rest], budget)
        except BudgetError:
            continue
        bound = max(bound, found[1].bound)
        if best is None or (found[1].value, -found[1].cost) > (best[1].value, -best[1].cost):
            best = found
    if best is None:
        raise BudgetError(f"the budget {budget:g} leaves no layer its cheapest attention.")
    return best[0], replace(best[1], bound=bound)


def _padded(rows: NDArray[Any], columns: int, fill: float) -> NDArray[Any]:
    return np.pad(rows, ((0, 0), (0, columns - rows.shape[1])), constant_values=fill)


@dataclass(frozen=True, slots=True)
class UniformSizes:
    """Every size that all layers of a model of `shape` might share [N], by KV groups, heads per
    group, then experts, then their channels, then those of MLPs. `channels` are of an MLP that is
    no expert, `experts` and their `widths` of layers that have any; where none does, 0.

    value: total worth, -inf where forced heads do not fit. cost: of all layers together. stock:
    whether the stock config takes the count of query heads.
    """

    query_heads: IntArray
    kv_heads: IntArray
    channels: IntArray
    experts: IntArray
    widths: IntArray
    shape: ModelShape
    value: FloatArray
    cost: IntArray
    stock: BoolArray

    @property
    def valid(self) -> BoolArray:
        """Sizes [N] that the stock config takes and forced heads allow."""
        return self.stock & (self.value > -np.inf)

    def layer(self, index: int) -> LayerShape:
        """The size at `index`, of a layer that has units of every kind."""
        return LayerShape(
            int(self.query_heads[index]),
            int(self.kv_heads[index]),
            int(self.channels[index]),
            (),
            self.shape.experts - int(self.experts[index]),
            self.shape.expert_channels - int(self.widths[index]),
        )

    def cheapest(self, among: BoolArray) -> int | None:
        """The size of lowest cost among those marked [N], the largest of equals; None without."""
        if not among.any():
            return None
        return int(np.flatnonzero(among & (self.cost == self.cost[among].min()))[-1])


@dataclass(frozen=True, slots=True)
class UniformChoice:
    """One size for all layers, and what else the stock config would have taken.

    `accepted` are all counts of query heads that the stock config takes and forced heads allow;
    `next_larger` the size of lowest cost above the budget, if any.
    """

    layer: LayerShape
    value: float
    accepted: tuple[int, ...]
    next_larger: LayerShape | None


def uniform_sizes(
    heads: Options | None,
    channels: NestedOptions | None,
    shape: ModelShape,
    kind: CostKind,
    accepts: Callable[[int], bool],
    latency: LatencyTable | None = None,
    experts: ExpertOptions | None = None,
    units: Units = "all",
) -> UniformSizes:
    """All sizes of the units given; those of a kind that is None stay, and cost nothing.

    accepts: whether the stock config takes a count of query heads. latency: the table, where `kind`
    is that. units: what experts are counted by, as of `expert_costs`.
    """
    query, groups = np.array([shape.query_heads]), np.array([shape.kv_heads])
    counts, widths = np.array([shape.experts]), np.array([shape.expert_channels])
    inner = np.array([shape.channels])
    head_value, expert_value, inner_value = np.zeros((3, 1))
    head_cost, expert_cost, inner_cost = np.zeros((3, 1), dtype=np.int64)
    stock = np.ones(1, dtype=bool)
    has_heads, has_channels = np.array(shape.has_heads), np.array(shape.has_channels)
    if heads is not None:
        a, b = regular_sizes(shape.kv_heads, shape.group_size)
        query, groups = (a * b).ravel(), (a * np.ones_like(b)).ravel()
        head_value = heads.value[has_heads].sum(axis=0).ravel()
        head_cost = head_costs(shape, kind, latency=latency).ravel() * has_heads.sum()
        stock = np.array([accepts(int(count)) for count in query], dtype=bool)
    if experts is not None:
        sizes = len(experts.counts), len(experts.widths)
        counts, widths = np.repeat(experts.counts, sizes[1]), np.tile(experts.widths, sizes[0])
        expert_value = experts.value.sum(axis=0).ravel()
        expert_cost = expert_costs(shape, experts, units).ravel() * len(experts.value)
    if channels is not None:
        inner, inner_value = np.array(channels.widths), channels.value[has_channels].sum(axis=0)
        inner_cost = width_costs(shape, channels.widths, latency) * has_channels.sum()
    lengths = len(query), len(counts), len(inner)

    def every(entries: NDArray[Any], axis: int) -> NDArray[Any]:
        """Entries of heads (0), experts (1) or MLPs (2), for every combination with the others."""
        along = [-1 if place == axis else 1 for place in range(3)]
        return np.broadcast_to(entries.reshape(along), lengths).ravel()

    return UniformSizes(
        query_heads=every(query, 0),
        kv_heads=every(groups, 0),
        channels=every(inner, 2),
        experts=every(counts, 1),
        widths=every(widths, 1),
        shape=shape,
        value=every(head_value, 0) + every(expert_value, 1) + every(inner_value, 2),
        cost=every(head_cost, 0) + every(expert_cost, 1) + every(inner_cost, 2),
        stock=every(stock, 0),
    )


def choose_uniform(sizes: UniformSizes, budget: float) -> UniformChoice:
    """The size with the most worth in `budget`, at equal worth the cheapest.

    Raises BudgetError where no accepted size is within the budget.
    """
    fits = sizes.valid & (sizes.cost <= budget)
    if not fits.any():
        raise BudgetError(
            f"no uniform size of accepted head count is within the budget {budget:g}."
        )
    best = int(np.lexsort((sizes.cost, -np.where(fits, sizes.value, -np.inf)))[0])
    above = sizes.cheapest(sizes.valid & (sizes.cost > budget))
    return UniformChoice(
        layer=sizes.layer(best),
        value=float(sizes.value[best]),
        accepted=tuple(np.unique(sizes.query_heads[sizes.valid]).tolist()),
        next_larger=None if above is None else sizes.layer(above),
    )
