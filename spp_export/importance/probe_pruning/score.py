"""From second moments by position to scores of units, and from scores to what is kept.

The metric is PPsp, output-only: the 2-norm over a unit's part of the consumer matrix of
W[i,c]^2 V[c]. V is not a mean but a sum over positions, as published; only ranks inside a layer use
it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spp_export.importance.probe_counts import channels_kept, depth_corrected, heads_dropped
from spp_export.importance.probe_pruning.blocks import AttentionBlock, ProbedBlock
from spp_export.importance.probe_pruning.probe import wide
from spp_export.models.shape import ModelShape

_EPSILON = 1e-6
_PROTECTED = 3
# With fewer layers than this, protecting the first three would leave next to nothing to prune.
_SHALLOW = 6


def fuse(probed: Tensor, history: Tensor) -> Tensor:
    """The larger of two moments [S,C] dominates, element by element: about (a^2+b^2)/(a+b)."""
    alpha = probed / (probed + history + _EPSILON)
    return alpha * probed + (1 - alpha) * history


def ppsp(moments_C: Tensor, weight: Tensor, units: int) -> Tensor:
    """Scores [units] from V [C] and the consumer's weight [d,C], C being units of equal width.

    The closed form of the norm of W^2 V: sqrt(sum over c of V_c^2 sum_i W[i,c]^4).
    """
    # the root first: V_c squared leaves fp32's range before V_c sqrt(...) does
    rooted = moments_C * wide(weight).square().norm(dim=0)
    scores: Tensor = rooted.view(units, -1).norm(dim=1)
    return scores


@dataclass(frozen=True)
class Targets:
    """How many units the published method keeps in a pruned layer, and which layers it leaves be.

    The first three layers are never pruned and the others pay for them; models of fewer than six
    layers have no protected layers.
    """

    skipped: int
    heads: int
    channels: int

    @classmethod
    def at(cls, shape: ModelShape, ratio: float, multiple: int) -> Targets:
        """The targets at a pruning ratio of the whole model, channels in multiples."""
        skipped = 0 if shape.num_layers < _SHALLOW else _PROTECTED
        p = depth_corrected(ratio, shape.num_layers, skipped)
        return cls(
            skipped,
            shape.query_heads - heads_dropped(p, shape.query_heads),
            channels_kept(p, shape.channels, multiple),
        )

    def keep(self, block: ProbedBlock, scores: Tensor) -> Tensor:
        """Mask [H] or [I] of the units a block keeps: all, or those of highest score."""
        kept = torch.ones_like(scores, dtype=torch.bool)
        if block.layer >= self.skipped:
            count = self.heads if isinstance(block, AttentionBlock) else self.channels
            kept[scores.argsort(stable=True)[: len(scores) - count]] = False
        return kept
