"""What an attention problem is, whoever solves it: its groups, its checks, who sees what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which KV group each of H query heads reads, in the forms that implementations index with.

    `widest` is the number of heads of the largest of G groups. The tensors are int64 on one device:
    `group_of_head` [H]; `slot_of_head` [H], a head's place where every group has `widest` places;
    `heads` [H], the heads sorted by group; `first` [G+1], where each group begins in `heads`.
    """

    widest: int
    group_of_head: Tensor
    slot_of_head: Tensor
    heads: Tensor
    first: Tensor

    @staticmethod
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def of(group_of_query: Sequence[int], groups: int, device: torch.device) -> Groups:
        """Kept for the next call: a CUDA graph may not copy from the host."""
        return _groups(tuple(group_of_query), groups, device)


@lru_cache(maxsize=1024)
def _groups(group_of_query: tuple[int, ...], groups: int, device: torch.device) -> Groups:
    heads = sorted(range(len(group_of_query)), key=lambda head: group_of_query[head])
    sizes = [group_of_query.count(group) for group in range(groups)]
    first = [sum(sizes[:group]) for group in range(groups + 1)]
    widest = max(sizes)
    slots = [0] * len(heads)
    for place, head in enumerate(heads):
        group = group_of_query[head]
        slots[head] = group * widest + place - first[group]
    tables = (group_of_query, slots, heads, first)
    # A table made in inference mode could not be saved for a gradient later on.
    with torch.inference_mode(False):
        return Groups(widest, *(torch.tensor(table, device=device) for table in tables))


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_of_query: Sequence[int],
    starts: Tensor | None,
    ends: Tensor | None,
    causal: bool,
    window: int | None,
) -> None:
    """Raise ValueError for shapes and options that do not fit together."""
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(f"query and key must have 4 axes, got {query.dim()} and {key.dim()}.")
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    if key.shape != (batch, groups, keys, width) or value.shape != key.shape:
        raise ValueError(
            f"key and value must be [{batch}, G, T, {width}] for query {list(query.shape)}, "
            f"got {list(key.shape)} and {list(value.shape)}."
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must be of one type, got {query.dtype}, {key.dtype} and "
            f"{value.dtype}."
        )
    if not heads or len(group_of_query) != heads or not set(group_of_query) <= set(range(groups)):
        raise ValueError(
            f"group_of_query must name one of {groups} groups for each of {heads} query heads, "
            f"got {list(group_of_query)}."
        )
    if ends is None and causal and queries > keys:
        raise ValueError(f"causal attention of {queries} queries needs as many keys, got {keys}.")
    for name, bound in (("starts", starts), ("ends", ends)):
        if bound is not None and (bound.shape != (batch,) or bound.is_floating_point()):
            raise ValueError(
                f"{name} must be {batch} integers, got {bound.dtype} {list(bound.shape)}."
            )
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window needs causal attention and a position, got {window}.")


def outside(keys: int, starts: Tensor | None, ends: Tensor | None) -> Tensor | None:
    """Positions before a row's start or from its end on: bool [B,T]; None if there are none."""
    if starts is None and ends is None:
        return None
    bounds = [bound for bound in (starts, ends) if bound is not None]
    position = torch.arange(keys, device=bounds[0].device)
    hidden = torch.zeros((len(bounds[0]), keys), dtype=torch.bool, device=position.device)
    if starts is not None:
        hidden = hidden | (position < starts[:, None])
    if ends is not None:
        hidden = hidden | (position >= ends[:, None])
    return hidden


def visible(
    queries: int,
    keys: int,
    starts: Tensor | None,
    ends: Tensor | None,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """Which positions each query sees: bool [B,S,T], or [1,S,T] where all rows see the same."""
    position = torch.arange(keys, device=device)
    own = torch.arange(queries, device=device) - queries
    own = own + (keys if ends is None else ends[:, None])
    seen = torch.ones((1, queries, keys), dtype=torch.bool, device=device)
    if causal:
        seen = position <= own.reshape(-1, queries, 1)
    if window is not None:
        seen = seen & (position > own.reshape(-1, queries, 1) - window)
    hidden = outside(keys, starts, ends)
    return seen if hidden is None else seen & ~hidden[:, None]
