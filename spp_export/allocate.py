"""Which heads a layer keeps at every regular size, and which size each layer gets.

A regular layer keeps `a` KV groups and `b` query heads in each of them. The best heads for a size
follow from the scores alone; the sizes of all layers are a multiple-choice knapsack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spp_export.errors import BudgetError, PlanError
from spp_export.knapsack import Choice, FloatArray, choose, on_grid
from spp_export.shape import ModelShape

CostKind = Literal["parameters", "kv-bytes"]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

_LARGEST_SCORE = 1e100


class Options(Protocol):
    """What every regular size of every layer keeps and what that is worth.

    value: [L,G,g], entry [l,a-1,b-1] the worth of layer l with a groups of b heads, -inf where it
    cannot be.
    """

    @property
    def value(self) -> FloatArray:
        """Worth of every size [L,G,g]."""

    def kept(self, groups: ArrayLike, heads: ArrayLike) -> BoolArray:
        """Kept query heads [L,G,g] with `groups` [L] KV groups of `heads` [L] query heads."""


@dataclass(frozen=True, slots=True)
class GivenOptions:
    """Options from a criterion that weighs whole sets: the best set of every size, as it found.

    value: [L,G,g]; sets: [L,G,g,G,g], entry [l,a-1,b-1] the query heads kept.
    """

    value: FloatArray
    sets: BoolArray

    def kept(self, groups: ArrayLike, heads: ArrayLike) -> BoolArray:
        """Kept query heads [L,G,g] with `groups` [L] KV groups of `heads` [L] query heads."""
        groups_L, heads_L = np.broadcast_arrays(groups, heads)
        kept: BoolArray = self.sets[np.arange(len(self.value)), groups_L - 1, heads_L - 1]
        return kept


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """The regular sizes of L layers with G groups of g query heads, and the best heads for each.

    value: [L,G,g], entry [l,a-1,b-1] the kept score of layer l with a groups of b heads, -inf where
    a forced head would not fit. head_rank: [L,G,g], place of a head in its group, best first.
    group_rank: [L,G,g], entry [l,k,b-1] the place of group k among the groups of b heads.
    """

    value: FloatArray
    head_rank: IntArray
    group_rank: IntArray

    def kept(self, groups: ArrayLike, heads: ArrayLike) -> BoolArray:
        """Kept query heads [L,G,g] with `groups` [L] KV groups of `heads` [L] query heads."""
        groups_L, heads_L = np.broadcast_arrays(groups, heads)
        layers = np.arange(len(self.value))
        kept_groups = self.group_rank[layers, :, heads_L - 1] < groups_L[:, None]
        return kept_groups[:, :, None] & (self.head_rank < heads_L[:, None, None])


@dataclass(frozen=True, slots=True)
class UniformChoice:
    """One size for all layers, and what else the stock config would have taken.

    `accepted` are all counts of query heads that the stock config takes and forced heads allow;
    `next_larger` the size of lowest cost above the budget as (groups, heads per group), if any.
    """

    groups: int
    heads: int
    value: float
    cost: float
    accepted: tuple[int, ...]
    next_larger: tuple[int, int] | None


def layer_options(
    scores_LH: ArrayLike, shape: ModelShape, forced_LH: BoolArray | None = None
) -> LayerOptions:
    """All regular sizes of every layer with the heads of highest score, ties to the lowest index.

    scores_LH: [L,H] finite, of any sign; H is the number of query heads. forced_LH: [L,H], heads
    that every option keeps: their groups are kept and every kept group has room for them.

    Raises PlanError for scores of another shape or that are not finite.
    """
    scores = _checked(scores_LH, shape)
    _, groups, size = scores.shape
    forced = np.zeros(scores.shape, dtype=bool)
    if forced_LH is not None:
        forced |= forced_LH.reshape(scores.shape)
    order = np.lexsort((-scores, ~forced), axis=-1)
    kept_score = np.cumsum(np.take_along_axis(scores, order, axis=-1), axis=-1)

    forced_heads = forced.sum(axis=-1)
    forced_groups = np.broadcast_to((forced_heads > 0)[:, :, None], scores.shape)
    group_order = np.lexsort((-kept_score, ~forced_groups), axis=1)
    value = np.cumsum(np.take_along_axis(kept_score, group_order, axis=1), axis=1)
    too_few_groups = np.arange(1, groups + 1) < (forced_heads > 0).sum(axis=1)[:, None]
    too_few_heads = np.arange(1, size + 1) < forced_heads.max(axis=1)[:, None]
    value[too_few_groups[:, :, None] | too_few_heads[:, None, :]] = -np.inf
    return LayerOptions(value, _rank(order, axis=-1), _rank(group_order, axis=1))


def sizes(options: Options) -> tuple[IntArray, IntArray]:
    """KV groups and query heads per group of every size, [G,1] and [1,g]."""
    _, groups, heads = options.value.shape
    return np.arange(1, groups + 1)[:, None], np.arange(1, heads + 1)[None, :]


def size_costs(shape: ModelShape, kind: CostKind) -> IntArray:
    """Cost [G,g] of a layer with a groups of b query heads at [a-1,b-1], in parameters of q, k, v
    and o or in bytes of KV cache per token."""
    groups = np.arange(1, shape.kv_heads + 1)[:, None]
    heads = np.arange(1, shape.group_size + 1)[None, :]
    if kind == "parameters":
        return groups * (heads * shape.query_head_parameters + shape.kv_head_parameters)
    return groups * (2 * shape.head_dim * shape.element_bytes) * np.ones_like(heads)


def allocate(options: Options, costs: ArrayLike, budget: float) -> Choice:
    """The size of every layer, as index a-1, b-1 flattened, with the most kept score in `budget`.

    costs: [G,g] or [L,G,g], positive integers (`size_costs`) or floats (a latency table).
    Exact; raises BudgetError where the smallest sizes exceed the budget.
    """
    layers = len(options.value)
    given = np.asarray(costs)
    flat = given.reshape(*given.shape[:-2], -1)
    return choose(options.value.reshape(layers, -1), flat, budget)


def allocate_uniform(
    options: Options, costs: ArrayLike, budget: float, accepts: Callable[[int], bool]
) -> UniformChoice:
    """The one size (a groups of b heads in every layer) with the most kept score in `budget`.

    accepts: whether the stock config takes a count of query heads. costs: [G,g] per layer.
    Raises BudgetError where no accepted size is within the budget.
    """
    value = options.value.sum(axis=0)
    cost = np.asarray(costs) * len(options.value)
    groups, heads = sizes(options)
    stock = stock_sizes(options, accepts)
    valid = stock & (value > -np.inf)
    fits = valid & (cost <= budget)
    if not fits.any():
        raise BudgetError(
            f"no uniform size of accepted head count is within the budget {budget:g}."
        )
    best = int(np.lexsort((cost.ravel(), -np.where(fits, value, -np.inf).ravel()))[0])
    larger = valid & (cost > budget)
    above = int(np.flatnonzero(larger & (cost == cost[larger].min()))[-1]) if larger.any() else None
    size = heads.size
    return UniformChoice(
        groups=best // size + 1,
        heads=best % size + 1,
        value=float(value.flat[best]),
        cost=cost.flat[best].item(),
        accepted=tuple(np.unique((groups * heads)[valid]).tolist()),
        next_larger=None if above is None else (above // size + 1, above % size + 1),
    )


def stock_sizes(options: Options, accepts: Callable[[int], bool]) -> BoolArray:
    """Sizes [G,g] whose count of query heads the stock config takes."""
    groups, heads = sizes(options)
    return np.array([[accepts(int(count)) for count in row] for row in groups * heads], dtype=bool)


def _checked(scores_LH: ArrayLike, shape: ModelShape) -> FloatArray:
    """Scores as [L,G,g] on a grid where their sums are exact."""
    scores = np.asarray(scores_LH, dtype=np.float64)
    expected = (shape.num_layers, shape.query_heads)
    if scores.shape != expected:
        raise PlanError(
            f"scores have shape {list(scores.shape)} but the model needs {list(expected)} "
            "(layers, query heads). Use artifacts made for this model."
        )
    if not (ordinary := np.abs(scores) <= _LARGEST_SCORE).all():
        layer, head = np.argwhere(~ordinary)[0]
        raise PlanError(
            f"layer {layer}: the score of query head {head} is {scores[layer, head]}, expected a "
            f"finite number of at most {_LARGEST_SCORE:g}. Make the artifacts again."
        )
    grouped = scores.reshape(shape.num_layers, shape.kv_heads, shape.group_size)
    return on_grid(grouped, scores.size)


def _rank(order: NDArray[np.intp], axis: int) -> IntArray:
    """Place of every entry in `order` along `axis`: the inverse permutation."""
    places = np.arange(order.shape[axis]).reshape([-1 if i == axis % 3 else 1 for i in range(3)])
    rank = np.empty(order.shape, dtype=np.int64)
    np.put_along_axis(rank, order, np.broadcast_to(places, order.shape), axis=axis)
    return rank
