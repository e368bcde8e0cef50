"""Small shapes, and layers by enumeration of every set of heads."""

from __future__ import annotations

import itertools

import numpy as np

from spp_export.models.shape import ModelShape


def model_shape(layers=2, query_heads=4, kv_heads=2, *, bias=False, **sizes):
    defaults = {
        "model_type": "qwen2",
        "hidden_size": 8,
        "head_dim": 3,
        "channels": 10,
        "vocab_size": 11,
        "tied_embeddings": True,
        "element_bytes": 2,
    }
    return ModelShape(
        **(defaults | sizes),
        num_layers=layers,
        query_heads=query_heads,
        kv_heads=kv_heads,
        qkv_bias=bias,
    )


def regular_masks(shape, forced=()):
    """Every set of query heads of one layer that is regular and holds the forced ones."""
    masks = []
    for bits in itertools.product([False, True], repeat=shape.query_heads):
        per_group = np.array(bits).reshape(shape.kv_heads, -1).sum(axis=1)
        counts = set(per_group[per_group > 0].tolist())
        if len(counts) == 1 and all(bits[head] for head in forced):
            masks.append(np.array(bits))
    return masks


def ragged_masks(shape, forced=()):
    """Every set of query heads of one layer that holds the forced ones, but for the empty one."""
    sets = itertools.product([False, True], repeat=shape.query_heads)
    return [np.array(bits) for bits in sets if any(bits) and all(bits[head] for head in forced)]


def layer_cost(shape, mask, kind):
    """Cost of a kept set, from the sizes of the sliced tensors."""
    groups = int(mask.reshape(shape.kv_heads, -1).any(axis=1).sum())
    if kind == "kv-bytes":
        return 2 * groups * shape.head_dim * shape.element_bytes
    query, kv = int(mask.sum()) * shape.head_dim, groups * shape.head_dim
    weights = 2 * query * shape.hidden_size + 2 * kv * shape.hidden_size
    return weights + (query + 2 * kv if shape.qkv_bias else 0)


def mask_of(layer, shape):
    """Kept query heads [H] of a LayerPlan, its KV groups checked on the way."""
    mask = np.zeros(shape.query_heads, dtype=bool)
    mask[list(layer.query_heads)] = True
    groups = np.flatnonzero(mask.reshape(shape.kv_heads, -1).any(axis=1))
    assert tuple(groups.tolist()) == layer.kv_heads
    return mask
