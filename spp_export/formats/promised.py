"""What a plan promises of a converted export, and what only the export can tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spp_export.models.checkpoint.checkpoint import Checkpoint, outputs_first
from spp_export.models.checkpoint.header import StoredTensor
from spp_export.models.checkpoint.reader import read_float
from spp_export.models.families import Role, TensorSpec
from spp_export.planning import Plan
from spp_export.planning.written import CONSUMERS, kept_tensors, loses, written_shape
from spp_export.slicing.compensation import real_columns, written_config
from spp_export.slicing.cut import written_tensor

if TYPE_CHECKING:
    from spp_export.slicing.projections import Projections


def promised_checkpoint(source: Checkpoint, compiled: Plan) -> Checkpoint:
    """The slim checkpoint that a plan makes of the source, without its weights; its path is the
    source's."""
    layers = compiled.written_shapes(source.shape)
    counts = source.shape.layer if compiled.written_layout == "per-layer" else layers[0]
    shape = written_shape(source, compiled)
    nowhere = source.path / "model.safetensors"
    tensors = {
        spec.name: StoredTensor(spec.name, nowhere, source.dtype, spec.shape, 0, 0)
        for spec in source.family.tensors(shape, layers)
    }
    return replace(
        source,
        config=written_config(source, compiled),
        shape=replace(shape, query_heads=counts.query_heads, kv_heads=counts.kv_heads),
        layers=layers,
        layout=compiled.written_layout,
        tensors=tensors,
    )


def kept_of(source: Checkpoint, compiled: Plan) -> Callable[[TensorSpec], NDArray[Any] | None]:
    """Reader of what the plan keeps of a tensor; None for one that compensation made."""
    pairs = kept_tensors(source.family, source.shape, compiled)
    # Experts are numbered anew, so that the source has them under other names.
    dense = {slim.name: spec for slim, spec in pairs}

    def kept(spec: TensorSpec) -> NDArray[Any] | None:
        if spec.name not in dense or _refitted(source, compiled, spec):
            return None
        before = dense[spec.name]
        whole = read_float(source.tensors[before.name])
        return written_tensor(whole, before, compiled, source.shape)

    return kept


def _refitted(source: Checkpoint, compiled: Plan, spec: TensorSpec) -> bool:
    """Whether a tensor belongs to a projection that compensation changed."""
    if spec.layer is None or compiled.compensation == "none":
        return False
    family, layer = source.family, compiled.layers[spec.layer]
    return any(
        spec.name.startswith(f"{family.layer_name(spec.layer, family.projection(role))}.")
        and loses(layer, role, source.shape)
        for role in CONSUMERS
    )


def compensated_projections(
    source: Checkpoint, compiled: Plan, read: Callable[[str], NDArray[Any]]
) -> Projections:
    """The compensated projections as an export has them, for the oracle to put in place.

    `read` gives a tensor of the export by its name in the checkpoint.
    """
    import torch

    from spp_export.slicing.projections import Projection

    has_bias = {
        spec.name
        for spec in source.family.tensors(
            written_shape(source, compiled), compiled.written_shapes(source.shape)
        )
        if spec.name.endswith(".bias")
    }
    projections = {}
    for index, layer in enumerate(compiled.layers):
        for role in CONSUMERS:
            if compiled.compensation == "none" or not loses(layer, role, source.shape):
                continue
            module = source.family.layer_name(index, source.family.projection(role))
            kept = layer.query_heads if role is Role.OUTPUT else layer.channels
            if kept == ():
                weight = torch.zeros(source.shape.hidden_size, 0)
            else:
                real = real_columns(compiled, index, role, source.shape)
                stored = outputs_first(source.family, read(f"{module}.weight"))[:, real]
                weight = torch.from_numpy(np.ascontiguousarray(stored))
            bias = None
            if f"{module}.bias" in has_bias:
                bias = torch.from_numpy(np.array(read(f"{module}.bias")))
            projections[index, role] = Projection(weight, bias)
    return projections
