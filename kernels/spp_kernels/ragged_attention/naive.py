"""The definition of ragged attention, one query head at a time.

This is the reference that the fast kernels of a later release are tested against. It is written to
be read, not to be run on anything large: scores of a head are materialised, and heads are a loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_of_query: Sequence[int],
    *,
    causal: bool = True,
    key_padding: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention output [B,Hq,Tq,D] of query heads that share KV groups unevenly.

    query [B,Hq,Tq,D]; key, value [B,G,Tk,D]; query head h reads group `group_of_query[h]`, in any
    order, and a group may have any number of heads, none included. The queries are the last Tq of
    the Tk positions, so Tq = 1 is a decoding step; `causal` lets each see the positions up to its
    own. key_padding [B,Tk] is True at positions that nobody sees; what they hold, NaN included,
    has no effect. `scale` defaults to 1/sqrt(D). A query that sees nothing gives zeros.

    Computed in float32, or float64 where that is the inputs' dtype; the result has the query's
    dtype. Raises ValueError for shapes that do not fit together.
    """
    _check(query, key, value, group_of_query, causal, key_padding)
    visible = _visible(query, key, causal, key_padding)
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    exact = torch.promote_types(query.dtype, torch.float32)
    if key_padding is not None:
        # A weight of zero does not silence a value of NaN.
        value = value.masked_fill(key_padding[:, None, :, None], 0)
    heads = []
    for head, group in enumerate(group_of_query):
        keys_BTD, values_BTD = key[:, group].to(exact), value[:, group].to(exact)
        scores = query[:, head].to(exact) @ keys_BTD.transpose(1, 2) * scale
        weights = scores.masked_fill(~visible, -math.inf).softmax(dim=2)
        # softmax over nothing is 0/0
        weights = weights.masked_fill(~visible.any(dim=2, keepdim=True), 0)
        heads.append(weights @ values_BTD)
    return torch.stack(heads, dim=1).to(query.dtype)


def _visible(query: Tensor, key: Tensor, causal: bool, key_padding: Tensor | None) -> Tensor:
    """Which keys each query sees: bool [B,Tq,Tk]."""
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    visible = torch.ones((batch, queries, keys), dtype=torch.bool, device=query.device)
    if causal:
        visible = visible.tril(diagonal=keys - queries)
    if key_padding is not None:
        visible = visible & ~key_padding[:, None, :]
    return visible


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_of_query: Sequence[int],
    causal: bool,
    key_padding: Tensor | None,
) -> None:
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(f"query and key must have 4 axes, got {query.dim()} and {key.dim()}.")
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    if key.shape != (batch, groups, keys, width) or value.shape != key.shape:
        raise ValueError(
            f"key and value must be [{batch}, G, Tk, {width}] for query {list(query.shape)}, "
            f"got {list(key.shape)} and {list(value.shape)}."
        )
    if len(group_of_query) != heads or not all(0 <= group < groups for group in group_of_query):
        raise ValueError(
            f"group_of_query must name one of {groups} groups for each of {heads} query heads, "
            f"got {list(group_of_query)}."
        )
    if causal and queries > keys:
        raise ValueError(f"causal attention of {queries} queries needs as many keys, got {keys}.")
    if key_padding is not None and (
        key_padding.shape != (batch, keys) or key_padding.dtype != torch.bool
    ):
        raise ValueError(
            f"key_padding must be bool [{batch}, {keys}], got {key_padding.dtype} "
            f"{list(key_padding.shape)}."
        )
