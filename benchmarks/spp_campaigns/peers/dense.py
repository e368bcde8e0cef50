"""What the peers that hold the whole model in memory have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM


def import_classes(model: Path) -> None:
    """Import this model's classes, which transformers otherwise does in from_pretrained."""
    _ = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(model))]


def load(model: Path, **options: Any) -> Any:
    """The dense model in its stored dtype."""
    return AutoModelForCausalLM.from_pretrained(model, dtype="auto", **options)


def elements(heads: Sequence[int], head_dim: int) -> torch.Tensor:
    """Rows of a projection that belong to heads."""
    within = torch.arange(head_dim)
    return (torch.tensor(heads, dtype=torch.long)[:, None] * head_dim + within).flatten()


def removed(kept: Sequence[int], count: int) -> list[int]:
    """The units that do not stay."""
    return sorted(set(range(count)) - set(kept))


def note_sizes(model: Any) -> None:
    """Tell modules and config what was cut: the last layer's sizes where layers differ, since the
    config has room for one of each."""
    config = model.config
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        config.head_dim = attention.head_dim
        config.num_attention_heads = attention.q_proj.weight.shape[0] // config.head_dim
        config.num_key_value_heads = attention.k_proj.weight.shape[0] // config.head_dim
        config.intermediate_size = mlp.gate_proj.weight.shape[0]
        groups = config.num_attention_heads // config.num_key_value_heads
        attention.num_key_value_groups = groups
