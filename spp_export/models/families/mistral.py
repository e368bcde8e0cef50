"""Mistral: GQA, no biases, optional sliding window."""

from __future__ import annotations

from spp_export.models.families.base import Family

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    sliding="all",
    end_token=2,
)
