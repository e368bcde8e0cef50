"""Decoders whose layers differ in query heads, KV heads and MLP width.

Layers, attention, caches and masks are the stock ones of transformers; only the place where layers
are built is ours. So every attention implementation, and every engine that looks for the stock
attention, works here too. Where the KV heads of a layer serve different numbers of query heads, the
stock attention gets its keys and values with a copy for each query head, made after the cache.
See configuration_spp.py for why this file imports so little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
    MistralRMSNorm,
    MistralRotaryEmbedding,
)
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from .configuration_spp import SppLlamaConfig, SppMistralConfig, SppQwen2Config, SppQwen3Config

__all__ = [
    "SppLlamaForCausalLM",
    "SppLlamaModel",
    "SppMistralForCausalLM",
    "SppMistralModel",
    "SppQwen2ForCausalLM",
    "SppQwen2Model",
    "SppQwen3ForCausalLM",
    "SppQwen3Model",
]


# An attention that spp_export registers, and that takes keys and values as they are cached.
_UNEVEN_ATTENTION = "spp_ragged"


class _RepeatingCache:
    """A cache, or none, whose keys and values come back with a copy for every query head."""

    def __init__(self, cache: Any, query_groups: Sequence[int]) -> None:
        self._cache = cache
        self._query_groups = query_groups

    def update(self, keys: Tensor, values: Tensor, *place: Any, **options: Any) -> Any:
        """Store keys and values [B,G,S,D]; all that are stored, as [B,H,T,D]."""
        if self._cache is not None:
            keys, values = self._cache.update(keys, values, *place, **options)
        return self._repeated(keys), self._repeated(values)

    def _repeated(self, states: Tensor) -> Tensor:
        # No index tensor: it would have to follow the model from device to device.
        heads = zip(states.split(1, dim=1), self._query_groups, strict=True)
        return torch.cat([head.expand(-1, count, -1, -1) for head, count in heads], dim=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _repeat(attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    if attention.config._attn_implementation == _UNEVEN_ATTENTION:
        return None
    cache = _RepeatingCache(kwargs.get("past_key_values"), attention.query_groups)
    return args, {**kwargs, "past_key_values": cache}


def _serve_unevenly(attention: Any, query_groups: Sequence[int]) -> None:
    """Let the KV heads of a stock attention serve these numbers of consecutive query heads."""
    attention.query_groups = tuple(query_groups)
    attention.num_key_value_groups = 1
    attention.register_forward_pre_hook(_repeat, with_kwargs=True)


class _PerLayerModel(PreTrainedModel):
    """Builds a stock decoder with layer i from `config.layer_config(i)`.

    The stock `__init__` builds every layer from the one config, so it is passed over.
    """

    layer_class: ClassVar[Any]
    norm_class: ClassVar[Any]
    rotary_class: ClassVar[Any]

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            self._build_layer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = self.norm_class(config.hidden_size, eps=config.rms_norm_eps)
        # Some rotary types read head counts to derive a head_dim; any layer's will do.
        self.rotary_emb = self.rotary_class(config=config.layer_config(0))
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in (
            getattr(config, "layer_types", None) or ()
        )
        self.post_init()

    def _build_layer(self, config: Any, index: int) -> Any:
        layer_config = config.layer_config(index)
        layer = self.layer_class(layer_config, index)
        query_groups = getattr(layer_config, "query_groups", ())
        if len(set(query_groups)) > 1:
            _serve_unevenly(layer.self_attn, query_groups)
        # Attention reads its implementation from its config at every call. A layer that kept its
        # own copy would miss later switches; with none set it would attend without a causal mask.
        layer.self_attn.config = config
        for name in getattr(config, "biased_projections", ()):
            linear = layer.get_submodule(name)
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
        return layer


class _PerLayerForCausalLM(PreTrainedModel):
    """Puts the language model head on a per-layer decoder."""

    model_class: ClassVar[Any]

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class SppLlamaModel(_PerLayerModel, LlamaModel):
    """Llama decoder with a shape of its own in every layer."""

    config_class = SppLlamaConfig
    layer_class = LlamaDecoderLayer
    norm_class = LlamaRMSNorm
    rotary_class = LlamaRotaryEmbedding


class SppLlamaForCausalLM(_PerLayerForCausalLM, LlamaForCausalLM):
    """`SppLlamaModel` with a language model head."""

    config_class = SppLlamaConfig
    model_class = SppLlamaModel


class SppMistralModel(_PerLayerModel, MistralModel):
    """Mistral decoder with a shape of its own in every layer."""

    config_class = SppMistralConfig
    layer_class = MistralDecoderLayer
    norm_class = MistralRMSNorm
    rotary_class = MistralRotaryEmbedding


class SppMistralForCausalLM(_PerLayerForCausalLM, MistralForCausalLM):
    """`SppMistralModel` with a language model head."""

    config_class = SppMistralConfig
    model_class = SppMistralModel


class SppQwen2Model(_PerLayerModel, Qwen2Model):
    """Qwen2 decoder with a shape of its own in every layer."""

    config_class = SppQwen2Config
    layer_class = Qwen2DecoderLayer
    norm_class = Qwen2RMSNorm
    rotary_class = Qwen2RotaryEmbedding


class SppQwen2ForCausalLM(_PerLayerForCausalLM, Qwen2ForCausalLM):
    """`SppQwen2Model` with a language model head."""

    config_class = SppQwen2Config
    model_class = SppQwen2Model


class SppQwen3Model(_PerLayerModel, Qwen3Model):
    """Qwen3 decoder with a shape of its own in every layer."""

    config_class = SppQwen3Config
    layer_class = Qwen3DecoderLayer
    norm_class = Qwen3RMSNorm
    rotary_class = Qwen3RotaryEmbedding


class SppQwen3ForCausalLM(_PerLayerForCausalLM, Qwen3ForCausalLM):
    """`SppQwen3Model` with a language model head."""

    config_class = SppQwen3Config
    model_class = SppQwen3Model
