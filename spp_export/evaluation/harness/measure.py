"""Scores of a row's model on every document, against the dense model's log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spp_export.calibration.activations import TokenBatch, input_device, token_batches
from spp_export.common.errors import UsageError
from spp_export.common.progress import progress
from spp_export.evaluation.bootstrap import DocumentScores
from spp_export.evaluation.harness.inputs import EvaluationText
from spp_export.evaluation.quality import (
    add_scores,
    documents_of,
    next_token_log_probabilities,
)

# A context that gives the row's model. It may be entered several times, one after the other.
Opened = Callable[[], AbstractContextManager[nn.Module]]
CPU_LIMIT_BYTES = 2_500_000_000
_BATCH_TOKENS = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True)
class Expected:
    """One batch of a text under the dense model, T predicted tokens.

    log_p [T,V] fp32, on the model's device; targets [T]; documents [T], the index of each token's.
    """

    text: int
    batch: TokenBatch
    log_p: Tensor
    targets: Tensor
    documents: Tensor


class DenseReference:
    """The dense model on all texts. Its log-probabilities are kept where they fit in
    `limit_bytes`; else three quarters of the limit hold the first of them, and the others are
    computed again, a quarter at a time, whenever they are asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        texts: Sequence[EvaluationText],
        vocab_size: int,
        *,
        batch_tokens: int | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        self.texts = tuple(texts)
        self._model = model
        device = input_device(model)
        size = batch_tokens or default_batch_tokens(device.type)
        batches = [
            (index, batch)
            for index, text in enumerate(texts)
            for batch in token_batches(tokenizer, text.read or text.documents, batch_tokens=size)
        ]
        _check_predicted(self.texts, batches)
        limit = _limit_bytes(device) if limit_bytes is None else limit_bytes
        self._groups = _partition(batches, 4 * vocab_size, limit)
        self._kept: list[Expected] | None = None

    @property
    def real_tokens(self) -> int:
        """Tokens that every row reads."""
        return sum(batch.real_tokens for group in self._groups for _, batch in group)

    def groups(self) -> Iterator[list[Expected]]:
        """All batches, as many at a time as memory holds; the dense model runs between groups."""
        for index, group in enumerate(self._groups):
            if index > 0:
                yield [_expected(self._model, *item) for item in group]
                continue
            if self._kept is None:
                self._kept = [_expected(self._model, *item) for item in group]
            yield self._kept


def default_batch_tokens(device_type: str) -> int:
    """Tokens per batch, padding included: logits of a large vocabulary are the memory here."""
    return _BATCH_TOKENS.get(device_type, _BATCH_TOKENS["cpu"])


def measure_row(reference: DenseReference, opened: Opened) -> list[DocumentScores]:
    """Scores per text of the model that `opened` gives."""
    sums = [
        torch.zeros((5, len(text.read or text.documents)), dtype=torch.float64)
        for text in reference.texts
    ]
    done = 0
    with progress("reading the texts", reference.real_tokens) as advance_to:
        for group in reference.groups():
            with opened() as model:
                for expected in group:
                    log_q, _ = next_token_log_probabilities(model, expected.batch)
                    add_scores(
                        sums[expected.text],
                        expected.log_p,
                        log_q,
                        expected.targets,
                        expected.documents,
                    )
                    done += expected.batch.real_tokens
                    advance_to(done)
    return [DocumentScores(*(row.numpy() for row in text_sums)) for text_sums in sums]


def _check_predicted(
    texts: Sequence[EvaluationText], batches: Sequence[tuple[int, TokenBatch]]
) -> None:
    for index, text in enumerate(texts):
        if not any(bool(batch.predicted.any()) for i, batch in batches if i == index):
            raise UsageError(f"text {text.name}: holds no document of two tokens or more.")


def _expected(model: nn.Module, text: int, batch: TokenBatch) -> Expected:
    log_p, targets = next_token_log_probabilities(model, batch)
    return Expected(text, batch, log_p, targets, documents_of(batch))


def _partition(
    batches: Sequence[tuple[int, TokenBatch]], token_bytes: int, limit: int
) -> list[list[tuple[int, TokenBatch]]]:
    """Batches in order, in groups whose log-probabilities stay within their share of the limit."""
    sizes = [token_bytes * batch.real_tokens for _, batch in batches]
    if sum(sizes) <= limit:
        return [list(batches)]
    groups: list[list[tuple[int, TokenBatch]]] = [[]]
    used = 0.0
    for item, size in zip(batches, sizes, strict=True):
        share = 0.75 if len(groups) == 1 else 0.25
        if groups[-1] and used + size > share * limit:
            groups.append([])
            used = 0
        groups[-1].append(item)
        used += size
    return groups


def _limit_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_LIMIT_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return free // 2
