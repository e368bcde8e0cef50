"""Continuing texts with an ONNX model: greedily or by sampling, token by token."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from spp_export.common.errors import CheckpointError, UsageError
from spp_export.formats.onnx.runtime.model import Decoding, Ids, Logits, OrtModel
from spp_export.formats.sampling import Chooser, Sampling, greedy

__all__ = ["Chooser", "Sampling", "generate", "greedy"]


def generate(
    model: OrtModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    choose: Chooser = greedy,
    eos: Collection[int] = (),
    min_new_tokens: int = 0,
) -> Iterator[list[int | None]]:
    """The next token of each prompt, step by step: at most `max_new_tokens` steps, fewer where all
    rows have ended.

    A row ends with a token of `eos`, which is the last it yields; None follows while other rows
    go on. Tokens of `eos` are not chosen among the first `min_new_tokens`.

    Raises UsageError at once for empty prompts, ids beyond the vocabulary, or more tokens than the
    model was made for.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UsageError("a prompt is empty; expected at least one token in each.")
    if max_new_tokens < 1 or min_new_tokens < 0:
        raise UsageError(
            f"max_new_tokens {max_new_tokens} and min_new_tokens {min_new_tokens}: expected at "
            "least 1 and 0."
        )
    rows = _padded(prompts, left=model.attention != "gqa")
    if rows.ids.min() < 0 or rows.ids.max() >= model.vocab_size:
        raise UsageError(f"a prompt has ids beyond the vocabulary of {model.vocab_size}.")
    # The last token is yielded, not read.
    decoding = model.start(len(prompts), rows.ids.shape[1] + max_new_tokens - 1)
    stop = np.array(sorted(eos), np.int64)
    return _steps(decoding, rows, max_new_tokens, min_new_tokens, choose, stop)


@dataclass(frozen=True)
class _Rows:
    """Prompts side by side: ids [B,S], mask [B,S] unless all are real, column of each last one."""

    ids: Ids
    mask: Ids | None
    last: Ids


def _steps(
    decoding: Decoding,
    rows: _Rows,
    max_new_tokens: int,
    min_new_tokens: int,
    choose: Chooser,
    stop: Ids,
) -> Iterator[list[int | None]]:
    going = np.ones(decoding.batch, bool)
    logits = decoding.feed(rows.ids, rows.mask)[np.arange(decoding.batch), rows.last]
    for step in range(max_new_tokens):
        _check_finite(logits, decoding.model)
        if step < min_new_tokens:
            logits[:, stop[(stop >= 0) & (stop < logits.shape[1])]] = -np.inf
        tokens = choose(logits)
        yield [int(token) if goes else None for token, goes in zip(tokens, going, strict=True)]
        going &= ~np.isin(tokens, stop)
        if step + 1 == max_new_tokens or not going.any():
            return
        logits = decoding.feed(tokens[:, None])[:, -1]  # rows that have ended idle along


def _check_finite(logits: Logits, model: OrtModel) -> None:
    if not np.isfinite(logits).all():
        raise CheckpointError(
            f"{model.path}: logits are not finite. "
            "Where the precision is fp16, export with --precision fp32 or bf16."
        )


def _padded(prompts: Sequence[Sequence[int]], *, left: bool) -> _Rows:
    lengths = np.array([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    ids = np.zeros((len(prompts), width), np.int64)
    columns = np.arange(width)
    mask = columns >= width - lengths[:, None] if left else columns < lengths[:, None]
    ids[mask] = np.concatenate([np.asarray(prompt, np.int64) for prompt in prompts])
    last = np.full(len(prompts), width - 1) if left else lengths - 1
    return _Rows(ids, None if mask.all() else mask.astype(np.int64), last)
