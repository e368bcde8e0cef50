"""`loraprune`: first-order saliency, every matrix with one vote.

LoRAPrune (ACL Findings 2024, arXiv 2305.18403): a unit's score in one matrix is the sum of its
weights' `|W G|`, with G the gradient seen through LoRA; the matrix's vector of scores is divided by
its L2 norm, and the matrices are added: q, k, v and o for a head, gate, up and down for a channel.
Group-sum.

Choices: without LoRA, so G is the gradient of the weight itself, and of one pass, so nothing is
smoothed over steps. Under GQA (the released code assumes as many KV heads as query heads) k_proj
and v_proj have a vector over KV heads, normalised as such, and each of the g query heads of a KV
head gets 1/g of its entry.
"""

from __future__ import annotations

import numpy as np

from spp_export.calibration.statistics import LayerStatistics
from spp_export.common.arrays import FloatArray
from spp_export.importance.base import Convention, Criterion, Need
from spp_export.importance.units import normalised, per_head, per_query_head


def heads(statistics: LayerStatistics) -> FloatArray:
    """Scores [H]."""
    assert statistics.gradients is not None
    gradients, count = statistics.gradients, statistics.heads
    own = (gradients.query_rows, gradients.output_columns)
    parts = [normalised(per_head(part, count)) for part in own]
    for part in (gradients.key_rows, gradients.value_rows):
        parts.append(per_query_head(normalised(per_head(part, statistics.groups)), count))
    total: FloatArray = np.sum(parts, axis=0)
    return total


def channels(statistics: LayerStatistics) -> FloatArray:
    """Scores [I]."""
    assert statistics.gradients is not None
    gradients = statistics.gradients
    parts = (gradients.gate_rows, gradients.up_rows, gradients.down_columns)
    total: FloatArray = np.sum([normalised(part) for part in parts], axis=0)
    return total


CRITERION = Criterion(
    name="loraprune",
    source="LoRAPrune (ACL Findings 2024) with the weight's own gradient",
    convention=Convention.GROUP_SUM,
    heads=heads,
    channels=channels,
    needs=frozenset({Need.GRADIENTS}),
)
