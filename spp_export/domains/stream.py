"""The model as the offline stage uses it, and pooled text with its domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from spp_export.calibration.activations import Observer, TextMeans, observe, token_batches
from spp_export.common.progress import Progress
from spp_export.domains.axes import FloatArray, IntArray
from spp_export.models.checkpoint.source import Source


@dataclass(frozen=True)
class Dense:
    """The frozen dense model, its tokenizer and its files."""

    model: nn.Module
    tokenizer: Any
    source: Source
    progress: Progress

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def watch(self, texts: Sequence[str], observer: Observer, description: str) -> None:
        """One forward pass over texts."""
        observe(
            self.model,
            self.source.family,
            token_batches(self.tokenizer, texts),
            [observer],
            progress=self.progress,
            description=description,
        )

    def pooled(self, texts: Sequence[str], description: str) -> FloatArray:
        """The residual stream after attention, averaged over each text's tokens [N,L,d]."""
        shape = self.source.shape
        means = TextMeans("residual", len(texts), shape.num_layers, shape.hidden_size)
        if texts:
            self.watch(texts, means, description)
        return means.values


@dataclass(frozen=True)
class Labelled:
    """Pooled texts [N,L,d] and the domain that each is of [N]."""

    pooled: FloatArray
    labels: IntArray

    def of(self, domains: Sequence[int]) -> Labelled:
        """Texts of these domains, numbered in this order."""
        number = {k: i for i, k in enumerate(domains)}
        kept = [n for n, k in enumerate(self.labels) if int(k) in number]
        labels = [number[int(self.labels[n])] for n in kept]
        return Labelled(self.pooled[kept], np.asarray(labels, dtype=np.int64))


def labelled(dense: Dense, parts: Sequence[Sequence[Sequence[str]]]) -> list[Labelled]:
    """Each part, which is a list of texts per domain, pooled; one pass for all."""
    texts = [text for part in parts for group in part for text in group]
    pooled = dense.pooled(texts, "pooling the stream")
    result, start = [], 0
    for part in parts:
        labels = [k for k, group in enumerate(part) for _ in group]
        stop = start + len(labels)
        result.append(Labelled(pooled[start:stop], np.asarray(labels, dtype=np.int64)))
        start = stop
    return result
