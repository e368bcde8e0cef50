"""The oracle: the dense model with the inputs of o_proj and down_proj zeroed for removed units, the
router's logits of removed experts at -inf, and zeros for what experts' removed channels write.

Removing a unit is exactly this. (Zeroing after o_proj would zero coordinates of the residual
stream, to which every head writes: a different function.) Where a norm goes over all heads or
channels at once, the masked model norms the kept ones alone, as the slim one does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from spp_export.models.families import Family, Role, TensorSpec
from spp_export.models.layerwise import stream_of
from spp_export.models.routing import expert_block, without_channels, without_experts
from spp_export.models.shape import ModelShape
from spp_export.planning import LayerPlan, Plan
from spp_export.slicing.cut import kept_indices, kept_units
from spp_export.slicing.projections import Projection, Projections


@contextmanager
def masked_dense(
    model: nn.Module,
    family: Family,
    shape: ModelShape,
    plan: Plan,
    compensated: Projections | None = None,
) -> Iterator[nn.Module]:
    """The dense `model` computing what the plan's slim model must compute; undone on exit.

    `compensated` puts other projections in place, their columns at the kept inputs or their rows at
    the kept outputs.
    """
    stream = stream_of(model)
    specs = [spec for spec in family.tensors(shape, shape.layers) if spec.unit]
    handles: list[Any] = []
    saved: list[tuple[Any, Any, Any]] = []

    def put_in_place(index: int) -> None:
        layer = plan.layers[index]
        inputs = _kept_inputs(layer, index, shape)
        outputs = _kept_outputs(layer, [spec for spec in specs if spec.layer == index])
        for role, kept in (*inputs.items(), *outputs.items()):
            if compensated and (index, role) in compensated:
                module: Any = model.get_submodule(family.layer_name(index, family.projection(role)))
                if stream is None:
                    saved.append((module, module.weight, module.bias))
                columns = slice(None) if role in outputs else kept
                rows = kept if role in outputs else slice(None)
                _replace(module, rows, columns, compensated[index, role], family.transposed)

    with ExitStack() as stack:
        stack.callback(_restore, handles, saved)
        for index, layer in enumerate(plan.layers):
            for role, inputs in _kept_inputs(layer, index, shape).items():
                if not family.projection(role):
                    continue  # of its MLPs whole experts are cut
                module = model.get_submodule(family.layer_name(index, family.projection(role)))
                width = shape.channels if role is Role.DOWN else shape.query_heads * shape.head_dim
                if len(inputs) < width:
                    handles.append(_mask_input(module, width, inputs))
            if layer.experts is not None or layer.expert_channels is not None:
                block = expert_block(model, family, index)
                assert block is not None, f"layer {index} has no experts"
                stay = range(shape.experts) if layer.experts is None else layer.experts
                if gone := sorted(set(range(shape.experts)) - set(stay)):
                    stack.enter_context(without_experts(block, gone))
                if layer.expert_channels is not None:
                    own = {expert: layer.channels_of(expert) or () for expert in stay}
                    stack.enter_context(without_channels(block, family, own))
            for name, kept in _kept_in_norms(family, layer, index, specs).items():
                norm = model.get_submodule(family.layer_name(index, name))
                handles.append(_norm_kept(norm, kept))
            if stream is None:
                put_in_place(index)
        if stream is not None:
            stack.enter_context(stream.editing(put_in_place))
        yield model


def _restore(handles: list[Any], saved: list[tuple[Any, Any, Any]]) -> None:
    for handle in handles:
        handle.remove()
    for module, weight, bias in saved:
        module.weight = weight
        module.bias = bias


def _kept_inputs(layer: LayerPlan, index: int, shape: ModelShape) -> dict[Role, Tensor]:
    """The inputs of o_proj and of down_proj that stay, of what the layer has of these."""
    channels = range(shape.channels) if layer.channels is None else layer.channels
    # Of a layer that keeps nothing, still indices.
    heads, within = torch.tensor(layer.query_heads, dtype=torch.long), torch.arange(shape.head_dim)
    kept = {
        Role.OUTPUT: (heads[:, None] * shape.head_dim + within).flatten(),
        Role.DOWN: torch.tensor(channels, dtype=torch.long),
    }
    has = {Role.OUTPUT: shape.has_heads[index], Role.DOWN: shape.has_channels[index]}
    return {role: inputs for role, inputs in kept.items() if has[role]}


def _kept_outputs(layer: LayerPlan, specs: Iterable[TensorSpec]) -> dict[Role, Tensor]:
    """The outputs of the other projections that stay; `specs` of the layer."""
    kept: dict[Role, Tensor] = {}
    for spec in specs:
        reads = spec.role in (Role.OUTPUT, Role.DOWN, Role.OTHER)
        if not reads and spec.axis is not None and len(spec.shape) == 2:
            units = kept_units(spec, layer)
            count = spec.shape[spec.axis] // spec.step
            units = tuple(range(count)) if units is None else units
            kept[spec.role] = torch.from_numpy(kept_indices(units, spec.step))
    return kept


def _kept_in_norms(
    family: Family, layer: LayerPlan, index: int, specs: Iterable[TensorSpec]
) -> dict[str, Tensor]:
    """What stays of a layer's norms over all heads or channels that lose any."""
    names = {f"{family.layer_name(index, norm)}.weight": norm for norm in family.wide_norms}
    kept: dict[str, Tensor] = {}
    for spec in specs:
        if spec.name in names and (units := kept_units(spec, layer)) is not None:
            kept[names[spec.name]] = torch.from_numpy(kept_indices(units, spec.step))
    return kept


def _norm_kept(norm: nn.Module, kept: Tensor) -> Any:
    """Let a norm see its inputs at `kept` alone; it gives 0 for the others."""

    def norm_again(whole: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        places = kept.to(output.device)
        own = copy(whole)
        own.__dict__["_parameters"] = {"weight": whole.weight[places]}
        result = torch.zeros_like(output)
        result[..., places] = own.forward(args[0][..., places])
        return result

    return norm.register_forward_hook(norm_again)


def _mask_input(module: nn.Module, width: int, kept: Tensor) -> Any:
    gone = torch.ones(width, dtype=torch.bool)
    gone[kept] = False

    def zero_removed(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal gone
        values = args[0]
        gone = gone.to(values.device)  # copies at the first call at most
        # filling, not multiplication: a removed unit's infinity must not become NaN
        return (values.masked_fill(gone, 0), *args[1:])

    return module.register_forward_pre_hook(zero_removed)


def _replace(
    module: Any,
    rows: Tensor | slice,
    columns: Tensor | slice,
    projection: Projection,
    transposed: bool,
) -> None:
    """What is not replaced is of units that are masked."""
    weight = torch.zeros_like(module.weight)
    (weight.T if transposed else weight)[rows, columns] = projection.weight.to(weight)
    module.weight = nn.Parameter(weight, requires_grad=False)
    if projection.bias is not None:
        module.bias = nn.Parameter(projection.bias.to(weight), requires_grad=False)
