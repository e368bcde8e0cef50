"""Where the parts that a layer's projections play are in the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from spp_export.models.families import Family, Role
from spp_export.models.shape import LayerShape, ModelShape

# What is computed of one input, in this order.
HEADS = (Role.QUERY, Role.KEY, Role.VALUE)


def outputs_of(
    family: Family, shape: ModelShape, layer: LayerShape
) -> Mapping[Role, slice | Sequence[int]]:
    """For each role that a module of the family has, which of the module's outputs it has.

    Of output and down projections all; roles whose module is missing are left out.
    """
    own = replace(
        shape, query_heads=layer.query_heads, kv_heads=layer.kv_heads, channels=layer.channels
    )
    rows: dict[Role, slice | Sequence[int]] = {}
    for role in Role:
        if role is Role.OTHER or not family.projection(role):
            continue
        whole = role in (Role.OUTPUT, Role.DOWN)
        rows[role] = slice(None) if whole else family.rows(role, own)
    return rows
