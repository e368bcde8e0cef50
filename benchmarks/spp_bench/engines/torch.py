"""A transformers model with its own cache and sdpa attention, on the CPU or a card."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from spp_bench.candidates import Candidate
from spp_bench.cases import Ids
from spp_bench.clocks import clock_for
from spp_bench.engines.runner import Logits
from spp_export.models.loader import load_dense, load_slim


class TorchRunner:
    """Runs as `generate` does: logits of the last token alone (0: of all), a cache that grows."""

    def __init__(self, name: str, model: PreTrainedModel, logits_to_keep: int = 1) -> None:
        self.name = name
        self._logits_to_keep = logits_to_keep
        self.model = model
        self.clock = clock_for(str(model.device))
        self._output: Any = None

    @classmethod
    def load(cls, candidate: Candidate, device: str) -> TorchRunner:
        """Load a candidate's checkpoint."""
        load = load_dense if candidate.dense else load_slim
        # Stock attention copies keys and values for each query head of an uneven group.
        uneven = any(not layer.regular for layer in candidate.sizes.layers)
        model = load(
            candidate.directory,
            dtype=getattr(torch, candidate.precision),
            device=device,
            attn_implementation="spp_ragged" if uneven else "sdpa",
        )
        return cls(candidate.name, model)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters; tied ones count once."""
        held = {p.untyped_storage().data_ptr(): p for p in self.model.parameters()}
        return sum(parameter.untyped_storage().nbytes() for parameter in held.values())

    def reserve(self, length: int) -> None:
        """Nothing: the cache grows."""

    def prefill(self, ids: Ids) -> Any:
        """Begin anew with prompts [B,S]."""
        self._output = None
        return self._forward(torch.from_numpy(ids))

    def decode(self, ids: Ids) -> Any:
        """One step for each column of [B,N]."""
        for column in torch.from_numpy(ids).to(self.model.device).T:
            self._forward(column[:, None])

    def logits(self) -> Logits:
        """Logits [B,V] at the last token fed."""
        values: Logits = self._output.logits[:, -1].float().cpu().numpy().astype(np.float32)
        return values

    def kv_bytes(self) -> int:
        """Bytes of the keys and values of all layers."""
        cache = self._output.past_key_values
        tensors = chain.from_iterable((layer.keys, layer.values) for layer in cache.layers)
        return sum(tensor.nbytes for tensor in tensors)

    def forget(self) -> None:
        """Free the cache."""
        self._output = None

    def _forward(self, ids: torch.Tensor) -> Any:
        cache = self._output.past_key_values if self._output else None
        with torch.inference_mode():
            self._output = self.model(
                input_ids=ids.to(self.model.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=self._logits_to_keep,
            )
        return self._output.logits
