"""A GGUF file run by llama.cpp, through the package xllamacpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spp_bench.candidates import Candidate
from spp_bench.cases import Ids
from spp_bench.clocks import wall_clock
from spp_bench.engines.runner import Logits
from spp_bench.gguf_weights import CACHE_BLOCK, cached_heads, stored_weights
from spp_export.common.errors import ModelError
from spp_export.formats.gguf.llama_cpp import LlamaCpp
from spp_export.formats.gguf.options import GGUF_NAME

# Below every logarithm of a number in single precision: llama.cpp's word for that of 0.
_NONE = -1e30


class LlamaRunner:
    """It chooses its own tokens greedily, but a step is one forward pass here, too.

    A prompt's own first choice is dropped, and decoding begins with a given token. The file is
    loaded anew for another number or length of sequences.
    """

    def __init__(self, candidate: Candidate, threads: int) -> None:
        """Load a candidate's file. ModelError where llama.cpp does not take it."""
        self.name = candidate.name
        self.clock = wall_clock
        self.weight_bytes = stored_weights(candidate.directory).total
        self._path = candidate.directory / GGUF_NAME
        self._heads = cached_heads(candidate.directory)
        self._sizes = candidate.sizes
        self._threads = threads
        self._engine: LlamaCpp | None = None
        self._sequences, self._length = 1, CACHE_BLOCK
        self._prompts: list[list[int]] = []
        self._load()

    @property
    def engine(self) -> LlamaCpp:
        """llama.cpp in its process, which is another one after `reserve` or `prefill`."""
        assert self._engine is not None
        return self._engine

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens per sequence, and for one that is chosen but not fed."""
        blocks = -(-(length + 1) // CACHE_BLOCK)
        self._resize(self._sequences, blocks * CACHE_BLOCK)

    def prefill(self, ids: Ids) -> Any:
        """Begin anew with prompts [B,S]."""
        self._resize(len(ids), self._length)
        self._prompts = ids.tolist()
        self._read(self._prompts, 1, cached=0)

    def decode(self, ids: Ids) -> Any:
        """As many steps as [B,N] has columns."""
        begun = [
            [*prompt, token]
            for prompt, token in zip(self._prompts, ids[:, 0].tolist(), strict=True)
        ]
        self._read(begun, ids.shape[1], cached=len(self._prompts[0]))

    def logits(self) -> Logits:
        """Log-probabilities [B,V] after the prompts."""
        values = np.full((len(self._prompts), self._sizes.shape.vocab_size), -np.inf, np.float32)
        for row, prompt in zip(values, self._prompts, strict=True):
            (step,) = self.engine.generate(prompt, 1, len(row))
            for token, value in step.likeliest:
                row[token] = value if value > _NONE else -np.inf
        return values

    def kv_bytes(self) -> int:
        """Bytes of the cache, which has its whole length from the start."""
        per_head = 2 * self._sizes.shape.head_dim * self._sizes.kv_element_bytes
        return self._sequences * self._length * self._heads * per_head

    def forget(self) -> None:
        """Nothing: the next prompt is read afresh."""

    def _resize(self, sequences: int, length: int) -> None:
        if (sequences, length) != (self._sequences, self._length):
            self._sequences, self._length = sequences, length
            self._load()

    def _load(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = LlamaCpp(
            self._path,
            self._length,
            self._threads,
            sequences=self._sequences,
            fast=True,
            half_cache=self._sizes.kv_element_bytes == 2,
        )

    def _read(self, prompts: Sequence[Sequence[int]], new: int, cached: int) -> None:
        """Have prompts continued, and make sure that this took the passes it should."""
        done = self.engine.read(prompts, new, afresh=not cached)
        expected = {"cached": cached, "read": len(prompts[0]) - cached, "new": new}
        if done != expected:
            raise ModelError(
                f"{self._path}: llama.cpp was to work on {expected} tokens, and did on {done}. "
                "This version of it cannot be measured."
            )
