"""The definition of ragged attention, one query head at a time.

The reference that the others are tested against. It is written to be read, not to be run on
anything large: the scores of a head are materialised, and heads are a loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spp_kernels.ragged_attention.problem import outside, visible


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_of_query: Sequence[int],
    *,
    starts: Tensor | None,
    ends: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
) -> Tensor:
    """As `ragged_attention`, computed in float32, or in float64 where that is the inputs' type."""
    exact = torch.promote_types(query.dtype, torch.float32)
    queries, keys = query.shape[2], key.shape[2]
    seen = visible(queries, keys, starts, ends, causal, window, query.device)
    hidden = outside(keys, starts, ends)
    if hidden is not None:
        # A weight of zero does not silence a value of NaN.
        value = value.masked_fill(hidden[:, None, :, None], 0)
    heads = []
    for head, group in enumerate(group_of_query):
        keys_BTD, values_BTD = key[:, group].to(exact), value[:, group].to(exact)
        scores = query[:, head].to(exact) @ keys_BTD.transpose(1, 2) * scale
        weights = scores.masked_fill(~seen, -math.inf).softmax(dim=2)
        # softmax over nothing is 0/0
        weights = weights.masked_fill(~seen.any(dim=2, keepdim=True), 0)
        heads.append(weights @ values_BTD)
    return torch.stack(heads, dim=1).to(query.dtype)
