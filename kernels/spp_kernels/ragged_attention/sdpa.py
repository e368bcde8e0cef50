"""Ragged attention by torch's own attention, which wants as many heads in every group.

`expanded` copies a group's keys and values for each of its heads: no arithmetic is wasted, but the
cache is written and read again. `folded` gives small groups heads of zeros and takes the heads of
a group for queries of one head, so that keys and values are read once. At a few queries, where
reading the cache is the work, `folded` is the faster on the CPU; above that arithmetic is, and
`expanded` is. `python -m spp_campaigns.ragged` measures both, and zero-padding with torch's
grouped-query attention, which wins in prefill where groups are equal or nearly so. CUDA has not
been measured and follows the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spp_kernels.ragged_attention.problem import Groups, outside, visible

FEW_QUERIES = 4


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
    """As `ragged_attention`, in the inputs' type, by the way that suits the number of queries."""
    queries, keys = query.shape[2], key.shape[2]
    groups = Groups.of(group_of_query, key.shape[1], query.device)
    way = folded if queries <= FEW_QUERIES else expanded
    all_alike = starts is None and ends is None and window is None
    if all_alike and (not causal or queries == 1):
        return way(query, key, value, groups, None, scale)
    if all_alike and queries == keys and way is expanded:
        return expanded(query, key, value, groups, None, scale, is_causal=True)
    hidden = outside(keys, starts, ends)
    if hidden is not None:
        # torch adds minus infinity to a hidden score, and NaN stays NaN
        key = key.masked_fill(hidden[:, None, :, None], 0)
        value = value.masked_fill(hidden[:, None, :, None], 0)
    seen = visible(queries, keys, starts, ends, causal, window, query.device)
    mixed = way(query, key, value, groups, seen, scale)
    return mixed if hidden is None else mixed.masked_fill(~seen.any(dim=2)[:, None, :, None], 0)


def expanded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Groups,
    seen: Tensor | None,
    scale: float,
    *,
    is_causal: bool = False,
) -> Tensor:
    """Keys and values copied for every query head. `seen` is bool [B or 1,S,T], None for all."""
    return scaled_dot_product_attention(
        query,
        key.index_select(1, groups.group_of_head),
        value.index_select(1, groups.group_of_head),
        attn_mask=None if seen is None else seen[:, None],
        is_causal=is_causal,
        scale=scale,
    )


def folded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Groups,
    seen: Tensor | None,
    scale: float,
) -> Tensor:
    """Small groups filled with heads of zeros; a group's heads are then queries of one head."""
    batch, _, queries, width = query.shape
    wide = query.new_zeros((batch, key.shape[1] * groups.widest, queries, width))
    wide.index_copy_(1, groups.slot_of_head, query)
    mixed = scaled_dot_product_attention(
        wide.reshape(*key.shape[:2], -1, width),
        key,
        value,
        attn_mask=None if seen is None else seen.repeat(1, groups.widest, 1)[:, None],
        scale=scale,
    )
    return mixed.reshape(wide.shape).index_select(1, groups.slot_of_head)
