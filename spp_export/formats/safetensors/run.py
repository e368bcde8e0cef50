"""A checkpoint that continues texts in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from spp_export.calibration.activations import input_device
from spp_export.formats.format import Feed
from spp_export.models.devices import require_device
from spp_export.models.loader import load_slim


class TorchModel:
    """A transformers model in evaluation mode."""

    runtime = "transformers"

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model

    @property
    def context_length(self) -> int:
        """Positions that the model's config knows."""
        return int(self._model.config.get_text_config().max_position_embeddings)

    def start(self, capacity: int) -> Feed:
        """A new sequence; the cache grows by itself, whatever the capacity."""
        device = input_device(self._model)
        cache = None

        @torch.no_grad()
        def feed(ids: Sequence[int]) -> NDArray[Any]:
            nonlocal cache
            output = self._model(
                input_ids=torch.tensor([list(ids)], device=device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits: NDArray[Any] = output.logits[0, -1].float().cpu().numpy()
            return logits

        return feed


def load_torch(directory: Path, device: str, dtype: str | None, threads: int | None) -> TorchModel:
    """The model in a directory. Raises UsageError where it cannot be run here."""
    require_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if dtype is None and device == "cpu":
        dtype = "float32"
    return TorchModel(load_slim(directory, dtype=dtype, device=device))
