# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, import-not-found"
"""Ragged attention on CUDA cards: keys and values are read once for all heads of a group.

The heads of a group at S positions are `size * S` rows of one matrix, position by position, so a
block of keys and values serves every head once it was read. Many queries fill the card with tiles
of rows (`_whole`). A few, as in decoding, do not: there the positions are shared out between
programs (`_split`), whose softmaxes are joined afterwards (`_join`).

Every row sees one interval of positions, which is all that padding, causality and a window amount
to. Nothing outside the intervals of a tile is ever read.

Shape suffixes: M rows, N positions, D head width, P splits. TRITON_INTERPRET=1, set before triton
is first imported, runs the kernels on CPU tensors, slowly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from spp_kernels.ragged_attention.problem import Groups

_INTERPRETED_PROCESSORS = 8
_MOST_SPLITS = 64
_MOST_SPLIT_ROWS = 64
# Of a block of rows or positions: three stages of keys and values fit the shared memory of cards
# from Ampere on. Neither this nor the numbers above have been tuned on a card.
_BLOCK_BYTES = 16384
_NO_WINDOW = 2**30


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
    """As `ragged_attention`: products in the inputs' type, sums and softmax in float32."""
    _check(query, key, value)
    batch, heads, queries, width = query.shape
    keys, groups = key.shape[2], Groups.of(group_of_query, key.shape[1], query.device)
    rows = groups.widest * queries
    block_m, block_n, block_d = _blocks(rows, width, query.element_size())
    splits = 1
    if rows <= min(block_m, _MOST_SPLIT_ROWS):
        splits = _splits(batch * key.shape[1], triton.cdiv(keys, block_n), query.device)
    output = torch.empty_like(query)
    problem = (
        *(query, key, value, starts, ends, groups.heads, groups.first),
        *(*query.stride(), *key.stride(), *value.stride()),
        *(key.shape[1], queries, keys, width, window or _NO_WINDOW, scale / math.log(2)),
    )
    blocks = {
        "CAUSAL": causal,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "WIDEN": _interpreted() and query.dtype == torch.bfloat16,
        "num_warps": 8 if block_m > 64 else 4,
        "num_stages": _stages(splits),
    }
    # Fused multiply-adds, which a later triton wants to be asked for.
    fused = {"enable_fp_fusion": True}
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        if splits == 1:
            grid = (triton.cdiv(rows, block_m), batch * key.shape[1])
            _whole[grid](*problem, output, *output.stride(), **blocks, **fused)
        else:
            shape, exact = (batch, heads, queries, splits), torch.float32
            parts = torch.empty((*shape, width), dtype=exact, device=query.device)
            sums = torch.empty(shape, dtype=exact, device=query.device)
            _split[splits, batch * key.shape[1]](
                *problem, parts, sums, heads, splits, **blocks, **fused
            )
            _join[batch * heads * queries,](
                *(parts, sums, output, *output.stride(), heads, queries, splits, width),
                BLOCK_P=triton.next_power_of_2(splits),
                BLOCK_D=block_d,
                **fused,
            )
    return output


def _blocks(rows: int, width: int, element_bytes: int) -> tuple[int, int, int]:
    """Rows, positions and elements of a head in a block; at least 16, as a product needs."""
    block_d = max(16, triton.next_power_of_2(width))
    fitting = max(16, _BLOCK_BYTES // (block_d * element_bytes))
    return max(16, min(128, fitting, triton.next_power_of_2(rows))), min(64, fitting), block_d


def _stages(splits: int) -> int:
    """Blocks of keys and values that are loaded ahead."""
    return 2 if splits == 1 else 3


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"implementation 'triton' takes float32, float16 or bfloat16, got {query.dtype}."
        )
    if query.is_cuda == _interpreted():
        tensors = "CPU tensors under TRITON_INTERPRET=1" if _interpreted() else "CUDA tensors"
        raise ValueError(f"implementation 'triton' takes {tensors}, got {query.device}.")
    backward = any(tensor.requires_grad for tensor in (query, key, value))
    if backward and torch.is_grad_enabled():
        raise ValueError("implementation 'triton' has no gradients. Use 'sdpa' to train.")


def _interpreted() -> bool:
    return not isinstance(_join, triton.JITFunction)


def _splits(programs: int, blocks: int, device: torch.device) -> int:
    """Parts of the positions that give every processor of the card two programs, if they last."""
    processors = _INTERPRETED_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(2 * processors // programs, blocks, _MOST_SPLITS))


@triton.jit(do_not_specialize=["keys"])
def _whole(
    query,
    key,
    value,
    starts,
    ends,
    heads,
    first,
    query_b,
    query_h,
    query_s,
    query_d,
    key_b,
    key_g,
    key_t,
    key_d,
    value_b,
    value_g,
    value_t,
    value_d,
    groups,
    queries,
    keys,
    width,
    window,
    scale,
    output,
    output_b,
    output_h,
    output_s,
    output_d,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of a group's rows over all that they see, straight into the result."""
    batch = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    size = (tl.load(first + group + 1) - tl.load(first + group)).to(tl.int32)
    # The last tiles see the most, so they begin first.
    tile = tl.cdiv(size * queries, BLOCK_M) - 1 - tl.program_id(0)
    if tile < 0:
        return
    real_M, head_M, at_M = _rows(tile, size, queries, heads + tl.load(first + group), BLOCK_M)
    low_M, high_M = _intervals(starts, ends, batch, real_M, at_M, queries, keys, window, CAUSAL)
    column_D = tl.arange(0, BLOCK_D)
    kept_MD = real_M[:, None] & (column_D < width)[None, :]
    row_M = head_M * query_h + at_M * query_s
    query_MD = tl.load(
        query + batch * query_b + row_M[:, None] + column_D[None, :] * query_d,
        mask=kept_MD,
        other=0.0,
    )
    mixed_MD, total_M, _ = _attend(
        query_MD,
        key + batch * key_b + group * key_g,
        value + batch * value_b + group * value_g,
        low_M,
        high_M,
        tl.min(low_M),
        tl.max(high_M),
        key_t,
        key_d,
        value_t,
        value_d,
        width,
        scale,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        WIDEN,
    )
    mixed_MD = mixed_MD / tl.where(total_M == 0, 1.0, total_M)[:, None]
    to_M = head_M * output_h + at_M * output_s
    tl.store(
        output + batch * output_b + to_M[:, None] + column_D[None, :] * output_d,
        mixed_MD.to(output.dtype.element_ty),
        mask=kept_MD,
    )


@triton.jit(do_not_specialize=["keys"])
def _split(
    query,
    key,
    value,
    starts,
    ends,
    heads,
    first,
    query_b,
    query_h,
    query_s,
    query_d,
    key_b,
    key_g,
    key_t,
    key_d,
    value_b,
    value_g,
    value_t,
    value_d,
    groups,
    queries,
    keys,
    width,
    window,
    scale,
    parts,
    sums,
    all_heads,
    splits,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """All rows of a group over one share of the positions that they see.

    `parts` [B,H,S,P,D] gets each row's mean of values, `sums` [B,H,S,P] the base-2 logarithm of
    its sum of weights; minus infinity, and no part, where a row sees nothing of the share.
    """
    batch = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    size = (tl.load(first + group + 1) - tl.load(first + group)).to(tl.int32)
    if size == 0:
        return
    real_M, head_M, at_M = _rows(0, size, queries, heads + tl.load(first + group), BLOCK_M)
    low_M, high_M = _intervals(starts, ends, batch, real_M, at_M, queries, keys, window, CAUSAL)
    low, high = tl.min(low_M), tl.max(high_M)
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), splits), BLOCK_N) * BLOCK_N
    low += tl.program_id(0) * share
    column_D = tl.arange(0, BLOCK_D)
    kept_MD = real_M[:, None] & (column_D < width)[None, :]
    row_M = head_M * query_h + at_M * query_s
    query_MD = tl.load(
        query + batch * query_b + row_M[:, None] + column_D[None, :] * query_d,
        mask=kept_MD,
        other=0.0,
    )
    mixed_MD, total_M, top_M = _attend(
        query_MD,
        key + batch * key_b + group * key_g,
        value + batch * value_b + group * value_g,
        low_M,
        high_M,
        low,
        tl.minimum(low + share, high),
        key_t,
        key_d,
        value_t,
        value_d,
        width,
        scale,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        WIDEN,
    )
    nothing_M = total_M == 0
    total_M = tl.where(nothing_M, 1.0, total_M)
    to_M = ((batch * all_heads + head_M) * queries + at_M) * splits + tl.program_id(0)
    tl.store(
        parts + to_M[:, None] * width + column_D[None, :],
        mixed_MD / total_M[:, None],
        mask=kept_MD & ~nothing_M[:, None],
    )
    tl.store(sums + to_M, tl.where(nothing_M, -float("inf"), top_M + tl.log2(total_M)), mask=real_M)


@triton.jit
def _join(
    parts,
    sums,
    output,
    output_b,
    output_h,
    output_s,
    output_d,
    all_heads,
    queries,
    splits,
    width,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row's parts, weighted by their sums, into the result."""
    row = tl.program_id(0).to(tl.int64)
    part_P, column_D = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    sum_P = tl.load(sums + row * splits + part_P, mask=part_P < splits, other=-float("inf"))
    # A part that saw nothing was never written.
    seen_P = sum_P > -float("inf")
    top = tl.max(sum_P)
    weight_P = tl.exp2(sum_P - tl.where(top == -float("inf"), 0.0, top))
    part_PD = tl.load(
        parts + (row * splits + part_P)[:, None] * width + column_D[None, :],
        mask=seen_P[:, None] & (column_D < width)[None, :],
        other=0.0,
    )
    total = tl.sum(weight_P)
    mixed_D = tl.sum(part_PD * weight_P[:, None], axis=0) / tl.where(total == 0, 1.0, total)
    batch, head = row // (all_heads * queries), row // queries % all_heads
    to = output + batch * output_b + head * output_h + row % queries * output_s
    tl.store(to + column_D * output_d, mixed_D.to(output.dtype.element_ty), mask=column_D < width)


@triton.jit
def _rows(tile, size, queries, heads, BLOCK_M: tl.constexpr):
    """Of a tile's rows: whether they are real, their query head and their query, int64."""
    row_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real_M = row_M < size * queries
    head_M = tl.load(heads + row_M % size, mask=real_M, other=0)
    return real_M, head_M, (row_M // size).to(tl.int64)


@triton.jit
def _intervals(starts, ends, batch, real_M, at_M, queries, keys, window, CAUSAL: tl.constexpr):
    """The positions `low` to `high` that each row sees; none of a row that is not real."""
    start, end = 0, keys
    if starts is not None:
        start = tl.maximum(tl.load(starts + batch).to(tl.int32), 0)
    if ends is not None:
        end = tl.minimum(tl.load(ends + batch).to(tl.int32), keys)
    own_M = end - queries + at_M.to(tl.int32)
    low_M = tl.maximum(own_M - window + 1, start)
    high_M = own_M + 1 if CAUSAL else tl.zeros_like(own_M) + end
    return tl.where(real_M, low_M, keys), tl.where(real_M, high_M, 0)


@triton.jit
def _attend(
    query_MD,
    key,
    value,
    low_M,
    high_M,
    low,
    high,
    key_t,
    key_d,
    value_t,
    value_d,
    width,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Weighted values [M,D], sums of weights [M] and greatest score [M] over `low` to `high`.

    Weights are two to the power of a score less its row's greatest, minus infinity where a row
    sees nothing.
    """
    mixed_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    top_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    column_D = tl.arange(0, BLOCK_D)
    for block in range(low, high, BLOCK_N):
        position_N = block + tl.arange(0, BLOCK_N)
        kept_ND = (position_N < high)[:, None] & (column_D < width)[None, :]
        far_N = position_N.to(tl.int64)
        key_ND = tl.load(
            key + far_N[:, None] * key_t + column_D[None, :] * key_d, mask=kept_ND, other=0.0
        )
        score_MN = _product(query_MD, tl.trans(key_ND), WIDEN) * scale
        seen_MN = (position_N[None, :] >= low_M[:, None]) & (position_N[None, :] < high_M[:, None])
        score_MN = tl.where(seen_MN & (position_N < high)[None, :], score_MN, -float("inf"))
        higher_M = tl.maximum(top_M, tl.max(score_MN, axis=1))
        # Nothing seen yet: any finite number will do, and keeps infinity from infinity.
        base_M = tl.where(higher_M == -float("inf"), 0.0, higher_M)
        weight_MN = tl.exp2(score_MN - base_M[:, None])
        shrunk_M = tl.exp2(top_M - base_M)
        total_M = total_M * shrunk_M + tl.sum(weight_MN, axis=1)
        value_ND = tl.load(
            value + far_N[:, None] * value_t + column_D[None, :] * value_d, mask=kept_ND, other=0.0
        )
        weight_MN = weight_MN.to(value_ND.dtype)
        mixed_MD = mixed_MD * shrunk_M[:, None] + _product(weight_MN, value_ND, WIDEN)
        top_M = higher_M
    return mixed_MD, total_M, top_M


@triton.jit
def _product(left, right, WIDEN: tl.constexpr):
    """Matrix product with sums in float32, and of float32 without rounding to tf32."""
    if WIDEN:  # the interpreter multiplies the bits of bfloat16 as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")
