"""The oracle: the dense model with the inputs of o_proj and down_proj zeroed for removed units.

Removing a unit is exactly this. (Zeroing after o_proj would zero coordinates of the residual
stream, to which every head writes: a different function.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spp_export.families import Family
from spp_export.plans import Plan
from spp_export.shape import ModelShape


@dataclass(frozen=True)
class OutputProjection:
    """A compensated o_proj: weight [d, kept*dh] for the kept heads in order, and maybe a bias."""

    weight: Tensor
    bias: Tensor | None = None


@contextmanager
def masked_dense(
    model: nn.Module,
    family: Family,
    shape: ModelShape,
    plan: Plan,
    compensated: Mapping[int, OutputProjection] | None = None,
) -> Iterator[nn.Module]:
    """The dense `model` computing what the plan's slim model must compute; undone on exit.

    `compensated` puts a layer's re-fitted o_proj in place, its columns at the kept heads.
    """
    handles: list[Any] = []
    saved: list[tuple[nn.Linear, Any, Any]] = []
    try:
        for index, layer in enumerate(plan.layers):
            output = _linear(model, family.layer_name(index, family.output))
            columns = _columns(layer.query_heads, shape.head_dim)
            handles.append(_mask_input(output, columns))
            if compensated and index in compensated:
                saved.append((output, output.weight, output.bias))
                _replace(output, columns, compensated[index])
            if layer.channels is not None:
                down = _linear(model, family.layer_name(index, family.down))
                handles.append(_mask_input(down, torch.tensor(layer.channels)))
        yield model
    finally:
        for handle in handles:
            handle.remove()
        for module, weight, bias in saved:
            module.weight = weight
            module.bias = bias


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear), name
    return module


def _columns(heads: tuple[int, ...], head_dim: int) -> Tensor:
    return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _mask_input(module: nn.Linear, kept: Tensor) -> Any:
    mask = torch.zeros(module.in_features, dtype=torch.bool)
    mask[kept] = True

    def zero_removed(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # where, not multiplication: a removed unit's infinity must not become NaN
        values = args[0]
        return (torch.where(mask.to(values.device), values, torch.zeros_like(values)), *args[1:])

    return module.register_forward_pre_hook(zero_removed)


def _replace(module: nn.Linear, columns: Tensor, projection: OutputProjection) -> None:
    weight = torch.zeros_like(module.weight)
    weight[:, columns.to(weight.device)] = projection.weight.to(weight)
    module.weight = nn.Parameter(weight, requires_grad=False)
    if projection.bias is not None:
        module.bias = nn.Parameter(projection.bias.to(weight), requires_grad=False)
