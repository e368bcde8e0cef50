"""Weights of a transformers model that stay on disk, and how they come into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import spp_export.models.modeling  # noqa: F401  registers the per-layer classes
from spp_export.common.errors import CheckpointError
from spp_export.common.progress import quiet_transformers
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.checkpoint.dtypes import FLOAT_DTYPES, Bits
from spp_export.models.checkpoint.header import StoredTensor, show
from spp_export.models.checkpoint.reader import blocks

# torch has no unsigned integers in all the versions that we work with.
_SIGNED = {2: np.int16, 4: np.int32, 8: np.int64}


class WeightBlock:
    """Modules whose weights come and go together: a layer, or the head."""

    def __init__(self, model: nn.Module, name: str, weights: Mapping[str, StoredTensor]) -> None:
        root = model.get_submodule(name)
        self._modules = [(module, dict(module._parameters)) for module in root.modules()]
        self._places: list[tuple[nn.Module, str]] = []
        self.stored: list[StoredTensor] = []
        for path, module in root.named_modules(prefix=name):
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    self._places.append((module, leaf))
                    self.stored.append(weights[f"{path}.{leaf}"])

    def fill(self, values: Sequence[Tensor]) -> None:
        """Put weights in place, in the order of `stored`."""
        for (module, leaf), value in zip(self._places, values, strict=True):
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    def empty(self) -> None:
        """Back to weights that take no memory; what others put in is gone, too."""
        for module, parameters in self._modules:
            module._parameters.clear()
            module._parameters.update(parameters)


class TableOnDisk(nn.Module):
    """An embedding of which only the rows that are asked for are read."""

    def __init__(self, table: StoredTensor, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._table, self._own_dtype = table, dtype
        # Callers look for the device and the dtype of the weights.
        none = torch.empty((0, table.shape[1]), dtype=dtype, device=device)
        self.weight = nn.Parameter(none, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [B,S,d] of ids [B,S]."""
        rows, place = ids.unique(return_inverse=True)
        size = self._table.nbytes // self._table.shape[0]
        stored_rows = [
            replace(
                self._table,
                shape=(1, self._table.shape[1]),
                offset=self._table.offset + row * size,
                nbytes=size,
            )
            for row in rows.tolist()
        ]
        dtype, device = self.weight.dtype, self.weight.device
        return torch.cat(
            [stored_as_tensor(row, self._own_dtype, dtype, device) for row in stored_rows]
        )[place]


def empty_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a directory's config, its weights without memory and its buffers computed."""
    try:
        from accelerate import init_empty_weights  # not needed by models that fit in memory

        with quiet_transformers(), init_empty_weights(include_buffers=False):
            config = AutoConfig.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # a damaged config can fail anywhere below
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{directory}: cannot be loaded: {first}") from error
    assert isinstance(model, PreTrainedModel)
    model.requires_grad_(False)
    model.eval()
    return model


def stored_weights(
    directory: Path, model: PreTrainedModel, opened: Checkpoint
) -> dict[str, StoredTensor]:
    """The stored tensor of each of a model's parameters, by name; all stored ones are in use."""
    family, stored = opened.family, opened.tensors
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    weights: dict[str, StoredTensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied = name == head and opened.shape.tied_embeddings
        tensor = stored.get(embedding if tied else name)
        if tensor is None or tensor.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{directory}: tensor {show(name)} is missing or has another shape than "
                "transformers gives it. The checkpoint is damaged."
            )
        weights[name] = tensor
    in_use = {tensor.name for tensor in weights.values()}
    if unused := stored.keys() - in_use:
        raise CheckpointError(
            f"{directory}: tensor {show(min(unused))} is unknown to transformers. "
            "The checkpoint is damaged."
        )
    return weights


def stored_as_tensor(
    stored: StoredTensor, own: torch.dtype, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A stored tensor rounded to `own` and then in `dtype`, with no second copy in memory."""
    result = torch.empty(stored.shape, dtype=dtype, device=device)
    start = 0
    for bits in blocks(stored):
        part = torch_bits(bits, stored.dtype)
        result[start : start + len(part)] = part.to(own)
        start += len(part)
    return result


def torch_bits(bits: Bits, dtype: str) -> Tensor:
    """Raw bits of a safetensors dtype as a tensor over the same memory."""
    return torch.from_numpy(bits.view(_SIGNED[bits.itemsize])).view(
        getattr(torch, FLOAT_DTYPES[dtype])
    )
