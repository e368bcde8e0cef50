"""Exporters that hold the whole model: what they share, and the script that a user would write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from spp_export.planning import Plan


def import_classes(model: Path) -> None:
    """Import this model's classes now; transformers would otherwise do it in from_pretrained."""
    _ = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(model))]


def load(model: Path, **options: Any) -> Any:
    """The dense model in its stored dtype."""
    return AutoModelForCausalLM.from_pretrained(model, dtype="auto", **options)


def elements(heads: Sequence[int], head_dim: int) -> torch.Tensor:
    """Rows of a projection that belong to heads."""
    within = torch.arange(head_dim)
    return (torch.tensor(heads, dtype=torch.long)[:, None] * head_dim + within).flatten()


def removed(kept: Sequence[int], count: int) -> list[int]:
    """The units that are removed."""
    return sorted(set(range(count)) - set(kept))


def note_sizes(model: Any) -> None:
    """Tell modules and config what was cut. Where layers differ, the config gets the last layer's
    sizes, since it has room for only one of each."""
    config = model.config
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        config.head_dim = attention.head_dim
        config.num_attention_heads = attention.q_proj.weight.shape[0] // config.head_dim
        config.num_key_value_heads = attention.k_proj.weight.shape[0] // config.head_dim
        config.intermediate_size = mlp.gate_proj.weight.shape[0]
        groups = config.num_attention_heads // config.num_key_value_heads
        attention.num_key_value_groups = groups


def export(model: Path, plan: Plan, out: Path) -> None:
    """Load, keep rows and columns in the stored dtype, set the config, save_pretrained."""
    dense = load(model)
    head_dim = dense.model.layers[0].self_attn.head_dim
    for layer, kept in zip(dense.model.layers, plan.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        query, kv = elements(kept.query_heads, head_dim), elements(kept.kv_heads, head_dim)
        _keep_rows(attention.q_proj, query)
        _keep_rows(attention.k_proj, kv)
        _keep_rows(attention.v_proj, kv)
        _keep_columns(attention.o_proj, query)
        if kept.channels is not None:
            channels = torch.tensor(kept.channels)
            _keep_rows(mlp.gate_proj, channels)
            _keep_rows(mlp.up_proj, channels)
            _keep_columns(mlp.down_proj, channels)
    note_sizes(dense)
    dense.save_pretrained(out)


def _keep_rows(module: nn.Linear, rows: Tensor) -> None:
    """Keep some outputs of a projection, biases with them."""
    module.weight = _parameter(module.weight, 0, rows)
    module.out_features = len(rows)
    if module.bias is not None:
        module.bias = _parameter(module.bias, 0, rows)


def _keep_columns(module: nn.Linear, columns: Tensor) -> None:
    """Keep some inputs of a projection."""
    module.weight = _parameter(module.weight, 1, columns)
    module.in_features = len(columns)


def _parameter(old: Tensor, axis: int, kept: Tensor) -> nn.Parameter:
    return nn.Parameter(old.detach().index_select(axis, kept), requires_grad=False)
