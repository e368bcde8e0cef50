"""Grouped-query attention whose KV groups have different numbers of query heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from spp_kernels.ragged_attention import naive, sdpa
from spp_kernels.ragged_attention.choice import fastest
from spp_kernels.ragged_attention.problem import check

__all__ = ["Implementation", "ragged_attention"]

Implementation = Literal["auto", "naive", "sdpa", "triton"]


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_of_query: Sequence[int],
    *,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Attention output [B,H,S,D] of query heads that share KV groups unevenly.

    With T = S and nothing but the defaults it is

        key = key[:, group_of_query]
        value = value[:, group_of_query]
        scaled_dot_product_attention(query, key, value, is_causal=True)

    query [B,H,S,D]; key, value [B,G,T,D], all of one type. Query head h reads group
    `group_of_query[h]`, in any order; a group may have any number of heads, none included.

    Row b consists of the positions `starts[b]` to `ends[b]` (integers [B]; 0 and T where not
    given): what precedes is padding on the left, what follows is not written yet. Nothing that
    lies outside them has an effect, NaN included. The queries are a row's last S positions, so
    S = 1 is a decoding step. `causal` lets each see the positions up to its own, `window` only the
    last so many of those, its own included. A query that sees nothing gives zeros. `scale`
    defaults to 1/sqrt(D).

    `implementation`: `naive` is the definition, in float32 or float64, and slow; `sdpa` is torch's
    attention; `triton` needs CUDA tensors of float32, float16 or bfloat16, reads keys and values
    once for all heads of a group, and has no gradients; `auto` is the fastest that was measured.

    Raises ValueError for what does not fit together, ModuleNotFoundError for `triton` without it.
    """
    check(query, key, value, group_of_query, starts, ends, causal, window)
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation must be one of {known}, got {implementation!r}.")
    if implementation == "auto":
        implementation = fastest(query, key)
    if implementation == "naive":
        attention = naive.attention
    elif implementation == "sdpa":
        attention = sdpa.attention
    else:
        from spp_kernels.ragged_attention import triton  # the compiler is loaded where it is used

        attention = triton.attention
    return attention(
        query,
        key,
        value,
        group_of_query,
        starts=starts,
        ends=ends,
        causal=causal,
        scale=1 / math.sqrt(query.shape[3]) if scale is None else scale,
        window=window,
    )
