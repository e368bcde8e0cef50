"""`spp_ragged`: an attention for transformers whose KV heads may serve different numbers of heads.

It hands keys and values to spp_kernels as they are cached. These kernels know rows of consecutive
positions, told by where they start and end; what no two numbers can say (sliding windows, packed
rows, padding in the middle) is masked and goes to torch's attention, with a copy of keys and values
for every query head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

NAME = "spp_ragged"


def register() -> None:
    """Make `attn_implementation="spp_ragged"` known to transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, bounds)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention output [B,S,H,D] of query [B,H,S,D] on key and value [B,G,T,D].

    `attention_mask` is what `bounds` gives, or any mask [B,1,S,T]. Raises ModuleNotFoundError
    where spp_kernels is not installed.
    """
    from spp_kernels.ragged_attention import ragged_attention

    if softcap is not None or s_aux is not None:
        raise ValueError(f"{NAME} knows no capped scores and no sinks. Use sdpa or eager.")
    group_of_query = _group_of_query(module, key.shape[1])
    starts = ends = None
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        starts, ends = attention_mask[:, 0, 0].unbind(dim=1)
        attention_mask = None
    if attention_mask is None and not dropout:
        output = ragged_attention(
            query, key, value, group_of_query, starts=starts, ends=ends, scale=scaling
        )
        return output.transpose(1, 2).contiguous(), None
    if starts is not None:
        raise ValueError(f"{NAME} has no dropout on padded rows. Train with sdpa.")
    output = scaled_dot_product_attention(
        query,
        key[:, group_of_query],
        value[:, group_of_query],
        attn_mask=None if attention_mask is None else attention_mask[..., : key.shape[2]],
        is_causal=attention_mask is None and query.shape[2] > 1,
        dropout_p=dropout,
        scale=scaling,
    )
    return output.transpose(1, 2).contiguous(), None


def bounds(**arguments: Any) -> Tensor | None:
    """Where each row starts and ends: int64 [B,1,1,2], of four axes like any mask that transformers
    passes on as it is. None where all rows are whole; a mask [B,1,S,T] where it takes more to say.

    `arguments` are those of transformers' own mask functions.
    """
    padding, first = arguments.get("attention_mask"), arguments.get("q_offset", 0)
    queries: int = arguments.get("q_length", 0)
    positions = arguments.get("cache_position")  # what transformers 4 has in place of an offset
    if positions is not None:
        first, queries = positions[0], len(positions)
    plain = arguments["mask_function"] is causal_mask_function and not arguments.get("kv_offset")
    if plain and padding is not None:
        padding = padding[:, : arguments["kv_length"]].bool()
        padding, plain = (None, True) if padding.all() else (padding, _consecutive(padding))
    if not plain:
        masked: Tensor | None = sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
        return masked
    whole = padding is None and isinstance(first, int) and first + queries == arguments["kv_length"]
    if whole:
        return None
    rows = arguments["batch_size"]
    device = arguments.get("device") if positions is None else positions.device
    starts = torch.zeros(rows, dtype=torch.int64, device=device)
    if padding is not None:
        starts = padding.to(torch.int64).argmax(dim=1)
    ends = torch.zeros_like(starts) + first + queries
    return torch.stack([starts, ends], dim=1)[:, None, None]


def _consecutive(padding: Tensor) -> bool:
    """Whether nothing is missing between the first and the last token of every row of [B,T]."""
    tokens = padding.to(torch.int64)
    last = (tokens * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)).amax(dim=1)
    return bool((last - tokens.argmax(dim=1) == tokens.sum(dim=1)).all())


def _group_of_query(module: Any, groups: int) -> Sequence[int]:
    sizes = getattr(module, "query_groups", None) or [module.num_key_value_groups] * groups
    return [group for group, size in enumerate(sizes) for _ in range(size)]
