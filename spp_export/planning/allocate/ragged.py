"""The sizes that a ragged layer's attention may have, and the heads that are best for each.

A ragged layer keeps any of its query heads; a KV group of which none is kept goes. So its size is
the number of KV groups and of query heads that are left, however these are spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from spp_export.common.arrays import BoolArray, FloatArray, IntArray
from spp_export.models.shape import ModelShape
from spp_export.planning.allocate.heads import ranked_heads
from spp_export.planning.allocate.scores import places


@dataclass(frozen=True, slots=True)
class RaggedOptions:
    """The ragged sizes of L layers with G groups of g of all H query heads, and the best heads.

    value: [L,G,H], entry [l,a-1,q-1] the most score that q query heads of a groups keep in layer l;
    -inf where there is no such set, or none that holds the forced heads. head_rank: [L,G,g], place
    of a head in its group, best first. taken: [G,L,G+1,H+1], entry [k,l,a,q] how many heads of
    group k are in the best set of q heads of a groups among the groups 0 to k.
    """

    value: FloatArray
    head_rank: IntArray
    taken: IntArray

    @property
    def query_heads(self) -> IntArray:
        """Query heads of every size [G,H]."""
        _, groups, heads = self.value.shape
        return np.tile(np.arange(1, heads + 1), (groups, 1))

    def kept(self, groups: ArrayLike, heads: ArrayLike) -> BoolArray:
        """Kept query heads [L,G,g] with `groups` [L] KV groups and `heads` [L] heads in all."""
        layers = np.arange(len(self.value))
        left_groups, left = (np.array(np.broadcast_to(n, layers.shape)) for n in (groups, heads))
        counts = np.zeros(self.head_rank.shape[:2], dtype=np.int64)
        for k in reversed(range(len(self.taken))):
            counts[:, k] = self.taken[k, layers, left_groups, left]
            left_groups -= counts[:, k] > 0
            left -= counts[:, k]
        kept: BoolArray = self.head_rank < counts[:, :, None]
        return kept


def ragged_options(
    scores_LH: ArrayLike, shape: ModelShape, forced_LH: BoolArray | None = None
) -> RaggedOptions:
    """All ragged sizes of every layer, each with the set of heads of highest score. Exact.

    Inside a group the best heads go together, ties to the lowest index; how many of each group is
    settled by dynamic programming over the groups, ties to the first of them. scores_LH and
    forced_LH, [L,H], are as for `layer_options`.

    Raises PlanError for scores of another shape or that are not finite.
    """
    forced, order, kept_score = ranked_heads(scores_LH, shape, forced_LH)
    layers, groups, size = kept_score.shape
    heads = groups * size
    worth = np.concatenate([np.zeros((layers, groups, 1)), kept_score], axis=-1)
    too_few = np.arange(size + 1) < forced.sum(axis=-1)[:, :, None]
    worth[too_few] = -np.inf

    best = np.zeros((layers, 1, 1))
    taken = np.zeros((groups, layers, groups + 1, heads + 1), dtype=np.int64)
    for k in range(groups):
        # So far there are at most k groups, with k*g heads.
        _, a, q = best.shape
        grown = np.full((size + 1, layers, a + 1, q + size), -np.inf)
        grown[0, :, :-1, :q] = best + worth[:, k, :1, None]
        for n in range(1, size + 1):
            grown[n, :, 1:, n : n + q] = best + worth[:, k, n, None, None]
        taken[k, :, : a + 1, : q + size] = grown.argmax(axis=0)
        best = grown.max(axis=0)
    return RaggedOptions(best[:, 1:, 1:], places(order, axis=-1), taken)
