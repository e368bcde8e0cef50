"""One size for all layers: the choice that a stock config can describe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spp_export.common.arrays import BoolArray, FloatArray, IntArray
from spp_export.common.errors import BudgetError
from spp_export.models.shape import LayerShape, ModelShape
from spp_export.planning.allocate.channels import ChannelOptions
from spp_export.planning.allocate.heads import Options, regular_sizes
from spp_export.planning.allocate.sizes import CostKind, head_costs, width_costs
from spp_export.planning.latency import LatencyTable


@dataclass(frozen=True, slots=True)
class UniformSizes:
    """Every size that all layers might share [N], by KV groups, heads per group, then channels.

    value: total worth, -inf where forced heads do not fit. cost: of all layers together. stock:
    whether the stock config takes the count of query heads.
    """

    query_heads: IntArray
    kv_heads: IntArray
    channels: IntArray
    value: FloatArray
    cost: IntArray
    stock: BoolArray

    @property
    def valid(self) -> BoolArray:
        """Sizes [N] that the stock config takes and forced heads allow."""
        return self.stock & (self.value > -np.inf)

    def layer(self, index: int) -> LayerShape:
        """The size at `index`."""
        return LayerShape(
            int(self.query_heads[index]), int(self.kv_heads[index]), int(self.channels[index])
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
    channels: ChannelOptions | None,
    shape: ModelShape,
    kind: CostKind,
    accepts: Callable[[int], bool],
    latency: LatencyTable | None = None,
) -> UniformSizes:
    """All sizes of the units given; those of a kind that is None stay, and cost nothing.

    accepts: whether the stock config takes a count of query heads. latency: the table, where `kind`
    is that.
    """
    query, groups = np.array([shape.query_heads]), np.array([shape.kv_heads])
    widths = np.array([shape.channels])
    head_value, head_cost = np.zeros(1), np.zeros(1, dtype=np.int64)
    width_value, width_cost = np.zeros(1), np.zeros(1, dtype=np.int64)
    stock = np.ones(1, dtype=bool)
    if heads is not None:
        a, b = regular_sizes(shape.kv_heads, shape.group_size)
        query, groups = (a * b).ravel(), (a * np.ones_like(b)).ravel()
        head_value = heads.value.sum(axis=0).ravel()
        head_cost = head_costs(shape, kind, latency=latency).ravel()
        stock = np.array([accepts(int(count)) for count in query], dtype=bool)
    if channels is not None:
        widths, width_value = np.array(channels.widths), channels.value.sum(axis=0)
        width_cost = width_costs(shape, channels.widths, latency)
    count = len(widths)
    return UniformSizes(
        query_heads=np.repeat(query, count),
        kv_heads=np.repeat(groups, count),
        channels=np.tile(widths, len(query)),
        value=np.add.outer(head_value, width_value).ravel(),
        cost=np.add.outer(head_cost, width_cost).ravel() * shape.num_layers,
        stock=np.repeat(stock, count),
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
