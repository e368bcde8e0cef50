"""What every exporter is asked for: the same seeded plans, per-layer and uniform."""

from __future__ import annotations

import numpy as np

from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.shape import ModelShape
from spp_export.planning import LayerPlan, Layout, Plan

# Layout, and the share of MLP channels kept.
PLANS: dict[str, tuple[Layout, float]] = {
    "per-layer, heads": ("per-layer", 1.0),
    "per-layer, heads and channels": ("per-layer", 0.75),
    "uniform, heads": ("uniform", 1.0),
    "uniform, heads and channels": ("uniform", 0.75),
}


def plans_for(source: Checkpoint) -> dict[str, Plan]:
    """Plans by name: both layouts, with heads alone and with heads and MLP channels."""
    return {name: _plan(source, layout, channels) for name, (layout, channels) in PLANS.items()}


def counts(source: Checkpoint, layout: Layout) -> tuple[tuple[int, int], ...]:
    """(KV heads, query heads of each) that layers keep in turn.

    uniform: whole groups are removed, as few as the stock class allows. per-layer: in turn, one
    query head of every group, one KV head, and both are removed.
    """
    shape = source.shape
    fewer = max(1, shape.kv_heads - 1), max(1, shape.group_size - 1)
    if layout == "uniform":
        accepts, size = source.family.stock_accepts(shape), shape.group_size
        kept = (groups for groups in range(fewer[0], 0, -1) if accepts(groups * size))
        return ((next(kept, shape.kv_heads), size),)
    return (shape.kv_heads, fewer[1]), (fewer[0], shape.group_size), fewer


def _plan(source: Checkpoint, layout: Layout, channels: float) -> Plan:
    shape, random = source.shape, np.random.default_rng(0)
    turns = counts(source, layout)
    layers = tuple(
        _layer(shape, *turns[index % len(turns)], channels, random)
        for index in range(shape.num_layers)
    )
    return Plan(source.fingerprint, source.name, layout, "none", layers)


def _layer(
    shape: ModelShape, kv_heads: int, group_size: int, channels: float, random: np.random.Generator
) -> LayerPlan:
    kept = _some(random, shape.kv_heads, kv_heads)
    heads = tuple(
        group * shape.group_size + head
        for group in kept
        for head in _some(random, shape.group_size, group_size)
    )
    width = round(shape.channels * channels)
    return LayerPlan(kept, heads, None if channels == 1 else _some(random, shape.channels, width))


def _some(random: np.random.Generator, count: int, kept: int) -> tuple[int, ...]:
    return tuple(sorted(random.permutation(count)[:kept].tolist()))
