"""An ONNX directory run by onnxruntime-genai's own generator."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime_genai as og

from spp_bench.candidates import Candidate
from spp_bench.cases import Ids
from spp_bench.clocks import wall_clock
from spp_bench.engines.runner import Logits
from spp_bench.onnx_weights import stored_weights
from spp_export.common.errors import UsageError


class GenaiRunner:
    """Its decode loop chooses its own tokens greedily, but a step is one forward pass here,
    too."""

    def __init__(self, candidate: Candidate, model: Any) -> None:
        self.name = candidate.name
        self.clock = wall_clock
        self.weight_bytes = stored_weights(candidate.directory).total
        self._layers = len(candidate.sizes.layers)
        self._model = model
        self._capacity = 0
        self._generator: Any = None
        self._batch = 0

    @classmethod
    def load(cls, candidate: Candidate, device: str, threads: int) -> GenaiRunner:
        """Open a candidate's directory."""
        config = og.Config(str(candidate.directory))
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        config.clear_providers()
        if device.startswith("cuda"):
            config.append_provider("cuda")
        try:
            return cls(candidate, og.Model(config))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"{candidate.directory}: onnxruntime-genai: {reason}") from error

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens per sequence, and for one that is chosen but not fed."""
        self._capacity = length + 1

    def prefill(self, ids: Ids) -> Any:
        """Begin anew with prompts [B,S]."""
        self.forget()
        self._batch = len(ids)
        settings = og.GeneratorParams(self._model)
        # No end of text may cut the run short.
        length = self._capacity
        settings.set_search_options(
            batch_size=self._batch, min_length=length, max_length=length, do_sample=False
        )
        self._generator = og.Generator(self._model, settings)
        self._generator.append_tokens(ids.astype(np.int32))

    def decode(self, ids: Ids) -> Any:
        """As many steps as [B,N] has columns. The first call only chooses from prefill's logits."""
        for _ in range(ids.shape[1] + 1):
            self._generator.generate_next_token()

    def logits(self) -> Logits:
        """Logits [B,V] at the last token fed."""
        values: Logits = np.asarray(self._generator.get_logits(), dtype=np.float32)
        return values.reshape(self._batch, -1, values.shape[-1])[:, -1]

    def kv_bytes(self) -> int:
        """Bytes of the cache's tensors, which the library hands out as copies."""
        names = (f"present.{i}.{part}" for i in range(self._layers) for part in ("key", "value"))
        return sum(self._generator.get_output(name).nbytes for name in names)

    def forget(self) -> None:
        """Free the cache."""
        self._generator = None
