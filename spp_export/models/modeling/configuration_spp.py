"""Configs of decoders whose layers differ in query heads, KV heads and MLP width.

This file and modeling_spp.py are copied into every checkpoint of such a model, where `auto_map` in
its config.json names them. So they import transformers and torch and nothing else, and one text has
to serve transformers 4.57 (configs are plain classes) and 5.x (configs are validated dataclasses).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

__all__ = ["SppLlamaConfig", "SppMistralConfig", "SppQwen2Config", "SppQwen3Config"]

C = TypeVar("C")


def _strict(cls: type[C]) -> type[C]:
    """Collect the validators anew: `strict` on the parent has already bound the parent's own."""
    return strict(cls) if dataclasses.is_dataclass(cls) else cls


class _PerLayerConfig:
    """What the per-layer configs add to the stock ones.

    `per_layer_config` maps a layer index (int, or digits as JSON has them) to the keys in which
    that layer departs from the rest of the config. `query_groups` among them, in ragged models,
    says how many consecutive query heads each KV head serves. `biased_projections` names modules of
    a layer, such as `mlp.down_proj`, that have a bias where the stock model has none.
    """

    def layer_config(self, index: int) -> Any:
        """The stock config of one layer, as a copy that may be read but not shared."""
        per_layer: Any = getattr(self, "per_layer_config", None) or {}
        if not isinstance(per_layer, Mapping):
            return per_layer[index]  # transformers >= 5.14 resolves it
        layer = copy.copy(self)
        for key, changes in per_layer.items():
            if int(key) == index:
                for name, value in changes.items():
                    setattr(layer, name, value)
        return layer

    def validate_architecture(self) -> None:
        """Accept head counts that do not divide hidden_size: head_dim is explicit here."""


@_strict
class SppLlamaConfig(_PerLayerConfig, LlamaConfig):
    """Llama with a shape of its own in every layer."""

    model_type = "spp_llama"


@_strict
class SppMistralConfig(_PerLayerConfig, MistralConfig):
    """Mistral with a shape of its own in every layer."""

    model_type = "spp_mistral"


@_strict
class SppQwen2Config(_PerLayerConfig, Qwen2Config):
    """Qwen2 with a shape of its own in every layer."""

    model_type = "spp_qwen2"


@_strict
class SppQwen3Config(_PerLayerConfig, Qwen3Config):
    """Qwen3 with a shape of its own in every layer."""

    model_type = "spp_qwen3"
