"""`llm-pruner`: first-order saliency of every weight of a unit, summed.

LLM-Pruner (NeurIPS 2023, arXiv 2305.11627), variant `param_first`, its command line's default: a
weight counts `|W dLoss/dW|` and a unit the sum over its weights, without any normalisation of the
matrices. Group-sum: a head's rows of q_proj and columns of o_proj and 1/g of the rows of k_proj and
v_proj of its KV head; a channel's rows of gate_proj and up_proj and its column of down_proj.

Choices: under GQA the released code scores whole KV groups, and adds up the wrong query heads to
do it (h, h+G, ...). Here query heads are scored, head h with KV head h//g, so that the sum over the
g heads of a group is the whole group's score.
"""

from __future__ import annotations

import numpy as np

from spp_export.calibration.statistics import LayerStatistics
from spp_export.common.arrays import FloatArray
from spp_export.importance.base import Convention, Criterion, Need
from spp_export.importance.units import per_head, per_query_head


def heads(statistics: LayerStatistics) -> FloatArray:
    """Scores [H] in units of the loss."""
    assert statistics.gradients is not None
    gradients, count = statistics.gradients, statistics.heads
    own = per_head(gradients.query_rows, count) + per_head(gradients.output_columns, count)
    shared = per_head(gradients.key_rows, statistics.groups)
    shared = shared + per_head(gradients.value_rows, statistics.groups)
    return own + per_query_head(shared, count)


def channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [I] in units of the loss."""
    assert statistics.gradients is not None
    gradients = statistics.gradients
    parts = (gradients.gate_rows, gradients.up_rows, gradients.down_columns)
    total: FloatArray = np.sum(parts, axis=0, dtype=np.float64)
    return total


CRITERION = Criterion(
    name="llm-pruner",
    source="LLM-Pruner (NeurIPS 2023), param_first",
    convention=Convention.GROUP_SUM,
    heads=heads,
    channels=channels,
    needs=frozenset({Need.GRADIENTS}),
)
