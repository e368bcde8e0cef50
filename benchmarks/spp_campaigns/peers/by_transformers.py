"""The script one would write: load, keep rows and columns, set the config, save."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from spp_campaigns.peers.dense import elements, load, note_sizes
from spp_export.planning import Plan


def export(model: Path, plan: Plan, out: Path) -> None:
    """Slice in memory, in the stored dtype, and save_pretrained."""
    dense = load(model)
    head_dim = dense.model.layers[0].self_attn.head_dim
    for layer, kept in zip(dense.model.layers, plan.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        query, kv = elements(kept.query_heads, head_dim), elements(kept.kv_heads, head_dim)
        keep_rows(attention.q_proj, query)
        keep_rows(attention.k_proj, kv)
        keep_rows(attention.v_proj, kv)
        keep_columns(attention.o_proj, query)
        if kept.channels is not None:
            channels = torch.tensor(kept.channels)
            keep_rows(mlp.gate_proj, channels)
            keep_rows(mlp.up_proj, channels)
            keep_columns(mlp.down_proj, channels)
    note_sizes(dense)
    dense.save_pretrained(out)


def keep_rows(module: nn.Linear, rows: Tensor) -> None:
    """Keep some outputs of a projection, biases with them."""
    module.weight = _parameter(module.weight, 0, rows)
    module.out_features = len(rows)
    if module.bias is not None:
        module.bias = _parameter(module.bias, 0, rows)


def keep_columns(module: nn.Linear, columns: Tensor) -> None:
    """Keep some inputs of a projection."""
    module.weight = _parameter(module.weight, 1, columns)
    module.in_features = len(columns)


def _parameter(old: Tensor, axis: int, kept: Tensor) -> nn.Parameter:
    return nn.Parameter(old.detach().index_select(axis, kept), requires_grad=False)
