"""Qwen2 and Qwen2.5: biases on q, k and v, none on o."""

from __future__ import annotations

from spp_export.models.families.base import Family

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    sliding="listed",
)
