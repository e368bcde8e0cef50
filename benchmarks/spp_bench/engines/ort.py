"""An ONNX directory run by ONNX Runtime, through the package's own `OrtModel`."""

from __future__ import annotations

from typing import Any

from spp_bench.candidates import Candidate
from spp_bench.cases import Ids
from spp_bench.clocks import wall_clock
from spp_bench.engines.runner import Logits
from spp_bench.onnx_weights import stored_weights
from spp_export.formats.onnx.runtime.cache import entries
from spp_export.formats.onnx.runtime.model import Decoding, OrtModel


class OrtRunner:
    """Every call returns the logits to the CPU, so the wall clock covers all of its work."""

    def __init__(self, candidate: Candidate, model: OrtModel) -> None:
        self.name = candidate.name
        self.clock = wall_clock
        self.model = model
        self.weight_bytes = stored_weights(candidate.directory).total
        self._element_bytes = candidate.sizes.kv_element_bytes
        self._capacity = 0
        self._decoding: Decoding | None = None
        self._logits: Logits | None = None
        self._fed = 0

    @classmethod
    def load(cls, candidate: Candidate, device: str, threads: int) -> OrtRunner:
        """Open a candidate's directory."""
        model = OrtModel.load(candidate.directory, device=device, threads=threads)
        return cls(candidate, model)

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens per sequence."""
        self._capacity = length

    def prefill(self, ids: Ids) -> Any:
        """Begin anew with prompts [B,S]."""
        self.forget()
        self._decoding = self.model.start(len(ids), self._capacity)
        return self._feed(ids)

    def decode(self, ids: Ids) -> Any:
        """One step for each column of [B,N]."""
        for column in ids.T:
            self._feed(column[:, None])

    def logits(self) -> Logits:
        """Logits [B,V] at the last token fed."""
        assert self._logits is not None
        return self._logits[:, -1]

    def kv_bytes(self) -> int:
        """Bytes of the cache's tensors, by the head counts of the graph's inputs.

        A shared buffer has the reserved size from the start; other caches grow.
        """
        assert self._decoding is not None
        length = self._fed if self.model.attention == "standard" else self._capacity
        cached = entries(self.model.session)
        elements = sum(entry.heads * entry.head_dim for entry in cached)
        return self._decoding.batch * length * elements * self._element_bytes

    def forget(self) -> None:
        """Free the cache."""
        self._decoding = self._logits = None
        self._fed = 0

    def _feed(self, ids: Ids) -> Logits:
        assert self._decoding is not None
        self._logits = self._decoding.feed(ids)
        self._fed += ids.shape[1]
        return self._logits
