"""The regular sizes that a layer's attention may have, and the heads that are best for each.

A regular layer keeps `a` KV groups and `b` query heads in each of them; see `ragged` for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spp_export.common.arrays import BoolArray, FloatArray, IntArray
from spp_export.models.shape import ModelShape
from spp_export.planning.allocate.scores import checked, places


class Options(Protocol):
    """What every size of every layer keeps and what that is worth.

    A size is a number of KV groups and a count n of query heads: in each group for regular layers,
    in all for ragged ones. value: [L,G,N], entry [l,a-1,n-1] the worth of layer l with a groups,
    -inf where it cannot be. query_heads: [G,N], how many query heads there are in all.
    """

    @property
    def value(self) -> FloatArray:
        """Worth of every size [L,G,N]."""

    @property
    def query_heads(self) -> IntArray:
        """Query heads of every size [G,N]."""

    def kept(self, groups: ArrayLike, heads: ArrayLike) -> BoolArray:
        """Kept query heads [L,G,g] at `groups` [L] KV groups and a count [L] of `heads`."""


@dataclass(frozen=True, slots=True)
class SetOptions:
    """Options from a criterion that weighs whole sets: the best set of every size, as it found.

    value: [L,G,N]; sets: [L,G,N,G,g], entry [l,a-1,n-1] the query heads kept. ragged: whether n
    counts the heads of all groups rather than of each.
    """

    value: FloatArray
    sets: BoolArray
    ragged: bool = False

    @property
    def query_heads(self) -> IntArray:
        """Query heads of every size [G,N]."""
        groups, heads = regular_sizes(*self.value.shape[1:])
        return heads * np.ones_like(groups) if self.ragged else groups * heads

    def kept(self, groups: ArrayLike, heads: ArrayLike) -> BoolArray:
        """Kept query heads [L,G,g] at `groups` [L] KV groups and a count [L] of `heads`."""
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

    @property
    def query_heads(self) -> IntArray:
        """Query heads of every size [G,g]."""
        groups, heads = regular_sizes(*self.value.shape[1:])
        return groups * heads

    def kept(self, groups: ArrayLike, heads: ArrayLike) -> BoolArray:
        """Kept query heads [L,G,g] with `groups` [L] KV groups of `heads` [L] query heads."""
        groups_L, heads_L = np.broadcast_arrays(groups, heads)
        layers = np.arange(len(self.value))
        kept_groups = self.group_rank[layers, :, heads_L - 1] < groups_L[:, None]
        return kept_groups[:, :, None] & (self.head_rank < heads_L[:, None, None])


def layer_options(
    scores_LH: ArrayLike, shape: ModelShape, forced_LH: BoolArray | None = None
) -> LayerOptions:
    """All regular sizes of every layer with the heads of highest score, ties to the lowest index.

    scores_LH: [L,H] finite, of any sign; H is the number of query heads. forced_LH: [L,H], heads
    that every option keeps: their groups are kept and every kept group has room for them.

    Raises PlanError for scores of another shape or that are not finite.
    """
    forced, order, kept_score = ranked_heads(scores_LH, shape, forced_LH)
    _, groups, size = kept_score.shape
    forced_heads = forced.sum(axis=-1)
    forced_groups = np.broadcast_to((forced_heads > 0)[:, :, None], kept_score.shape)
    group_order = np.lexsort((-kept_score, ~forced_groups), axis=1)
    value = np.cumsum(np.take_along_axis(kept_score, group_order, axis=1), axis=1)
    too_few_groups = np.arange(1, groups + 1) < (forced_heads > 0).sum(axis=1)[:, None]
    too_few_heads = np.arange(1, size + 1) < forced_heads.max(axis=1)[:, None]
    value[too_few_groups[:, :, None] | too_few_heads[:, None, :]] = -np.inf
    return LayerOptions(value, places(order, axis=-1), places(group_order, axis=1))


def ranked_heads(
    scores_LH: ArrayLike, shape: ModelShape, forced_LH: BoolArray | None
) -> tuple[BoolArray, NDArray[np.intp], FloatArray]:
    """Heads of every group by score, forced ones first; all [L,G,g].

    The forced ones; the order in which heads are kept, indices in their group; and what the first
    heads in that order score together. Raises PlanError as `layer_options` does.
    """
    size = (shape.num_layers, shape.kv_heads, shape.group_size)
    flat = checked(scores_LH, size[0], shape.query_heads, unit="query head", plural="query heads")
    scores = flat.reshape(size)
    forced = np.zeros(size, dtype=bool)
    if forced_LH is not None:
        forced |= forced_LH.reshape(size)
    order = np.lexsort((-scores, ~forced), axis=-1)
    return forced, order, np.cumsum(np.take_along_axis(scores, order, axis=-1), axis=-1)


def regular_sizes(groups: int, group_size: int) -> tuple[IntArray, IntArray]:
    """KV groups and query heads per group of every regular size, [G,1] and [1,g]."""
    return np.arange(1, groups + 1)[:, None], np.arange(1, group_size + 1)[None, :]
