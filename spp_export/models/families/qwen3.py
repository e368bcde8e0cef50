"""Qwen3: normalised queries and keys, explicit head_dim."""

from __future__ import annotations

from spp_export.models.families.base import Family

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    qk_norm=True,
    sliding="listed",
)
