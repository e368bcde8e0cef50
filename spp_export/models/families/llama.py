"""Llama 1 to 3 and its many descendants: MHA or GQA, biases by config."""

from __future__ import annotations

from spp_export.models.families.base import Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    heads_divide_hidden=True,
    end_token=2,
)
