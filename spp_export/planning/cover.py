"""Layers from a ragged choice of heads: regular ones around it, or ragged ones of just these."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from spp_export.models.shape import ModelShape
from spp_export.planning.allocate import layer_options, ragged_options
from spp_export.planning.compile import layer_plans
from spp_export.planning.plan import LayerPlan


def cover(
    kept_LH: ArrayLike, shape: ModelShape, scores_LH: ArrayLike | None = None
) -> tuple[LayerPlan, ...]:
    """The smallest regular layers that contain the kept query heads [L,H].

    A layer gets every group that has a kept head, and in each of them as many heads as the fullest
    needs; an empty layer gets one head. Room that is left goes to the heads of highest score, or
    to those of lowest index. Costs grow with both counts, so no regular layer around these heads
    is smaller in parameters or KV cache. PlanError where the mask or the scores have another shape.
    """
    kept = np.asarray(kept_LH, dtype=bool)
    scores = np.zeros(kept.shape) if scores_LH is None else scores_LH
    options = layer_options(scores, shape, kept)
    per_group = kept.reshape(options.value.shape).sum(axis=2)
    groups = np.maximum((per_group > 0).sum(axis=1), 1)
    heads = np.maximum(per_group.max(axis=1), 1)
    return layer_plans(options.kept(groups, heads))


def exactly(kept_LH: ArrayLike, shape: ModelShape, scores_LH: ArrayLike) -> tuple[LayerPlan, ...]:
    """The ragged layers of the kept query heads [L,H]; an empty layer gets its best head.

    PlanError where the mask or the scores have another shape.
    """
    kept = np.array(kept_LH, dtype=bool)
    options = ragged_options(scores_LH, shape, kept)
    per_group = kept.reshape(len(kept), shape.kv_heads, -1).any(axis=2)
    groups, heads = per_group.sum(axis=1), kept.sum(axis=1)
    return layer_plans(options.kept(np.maximum(groups, 1), np.maximum(heads, 1)))
