"""ONNX Runtime behind the interface of a PyTorch model, for measures that know only that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from spp_export.formats.onnx.runtime.model import OrtModel


class OrtModule(nn.Module):
    """Gives logits [B,S,V] for ids [B,S] and a mask, without a cache; tensors are on `device`."""

    def __init__(self, model: OrtModel, device: str = "cpu") -> None:
        super().__init__()
        self._model = model
        # Callers look for the device of the weights.
        self.placeholder = nn.Parameter(torch.empty(0, device=device), requires_grad=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> Any:
        """As a transformers model; `use_cache` must stay False."""
        assert not use_cache
        mask = None if attention_mask is None else attention_mask.cpu().numpy()
        logits = torch.from_numpy(self._model.logits(input_ids.cpu().numpy(), mask))
        return SimpleNamespace(logits=logits.to(input_ids.device))
