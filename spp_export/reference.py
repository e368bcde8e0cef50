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

from spp_export.families import Family, Role
from spp_export.plans import LayerPlan, Plan
from spp_export.shape import ModelShape


@dataclass(frozen=True)
class Projection:
    """A compensated o_proj or down_proj: weight [d, kept inputs] in order, and maybe a bias [d]."""

    weight: Tensor
    bias: Tensor | None = None


# (layer, OUTPUT or DOWN) -> what stands in that projection's place.
Projections = Mapping[tuple[int, Role], Projection]


@contextmanager
def masked_dense(
    model: nn.Module,
    family: Family,
    shape: ModelShape,
    plan: Plan,
    compensated: Projections | None = None,
) -> Iterator[nn.Module]:
    """The dense `model` computing what the plan's slim model must compute; undone on exit.

    `compensated` puts re-fitted projections in place, their columns at the kept inputs.
    """
    handles: list[Any] = []
    saved: list[tuple[nn.Linear, Any, Any]] = []
    try:
        for index, layer in enumerate(plan.layers):
            for role, inputs in _kept_inputs(layer, shape).items():
                module = _linear(model, family.layer_name(index, family.consumer(role)))
                if len(inputs) < module.in_features:
                    handles.append(_mask_input(module, inputs))
                if compensated and (index, role) in compensated:
                    saved.append((module, module.weight, module.bias))
                    _replace(module, inputs, compensated[index, role])
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


def _kept_inputs(layer: LayerPlan, shape: ModelShape) -> dict[Role, Tensor]:
    """The inputs of o_proj and of down_proj that stay."""
    channels = range(shape.channels) if layer.channels is None else layer.channels
    heads, within = torch.tensor(layer.query_heads), torch.arange(shape.head_dim)
    return {
        Role.OUTPUT: (heads[:, None] * shape.head_dim + within).flatten(),
        Role.DOWN: torch.tensor(channels),
    }


def _mask_input(module: nn.Linear, kept: Tensor) -> Any:
    gone = torch.ones(module.in_features, dtype=torch.bool)
    gone[kept] = False

    def zero_removed(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal gone
        values = args[0]
        gone = gone.to(values.device)  # copies at the first call at most
        # filling, not multiplication: a removed unit's infinity must not become NaN
        return (values.masked_fill(gone, 0), *args[1:])

    return module.register_forward_pre_hook(zero_removed)


def _replace(module: nn.Linear, columns: Tensor, projection: Projection) -> None:
    weight = torch.zeros_like(module.weight)
    weight[:, columns.to(weight.device)] = projection.weight.to(weight)
    module.weight = nn.Parameter(weight, requires_grad=False)
    if projection.bias is not None:
        module.bias = nn.Parameter(projection.bias.to(weight), requires_grad=False)
