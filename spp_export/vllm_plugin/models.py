"""vLLM's decoders with a config of its own for every layer.

Everything but the shapes is vLLM's: fused projections, its attention and KV cache, LoRA, pipeline
and tensor parallelism. Qwen2 runs on the Llama layers, which are the same but for biases and take
the size of a head from the config; vLLM's Qwen2 derives it from the hidden size.
"""

from __future__ import annotations

import copy
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
)
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer, Qwen3Model
from vllm.model_executor.models.utils import extract_layer_index

_OUTPUT = "self_attn.o_proj"


def layer_config(config: Any, prefix: str) -> Any:
    """The config of the layer that `prefix` names, with the biases of bias compensation.

    Raises ValueError for a bias that vLLM's layers cannot have by itself, and for groups of
    different sizes.
    """
    index = extract_layer_index(prefix)
    layer = copy.copy(config.layer_config(index))
    if len(set(getattr(layer, "query_groups", None) or ())) > 1:
        raise ValueError(
            f"layer {index}: its KV heads serve different numbers of query heads, which vLLM's "
            "attention does not know. Export with --layout ragged --pad."
        )
    biased = set(getattr(config, "biased_projections", None) or ())
    if biased - {_OUTPUT}:
        raise ValueError(
            f"layer {index}: a bias on {min(biased - {_OUTPUT})} alone is none of vLLM's. "
            "Export with --compensate lstsq."
        )
    if biased:
        # vLLM gives o_proj a bias with attention_bias, and q, k and v one with qkv_bias instead
        # where the config has that.
        layer.qkv_bias = bool(getattr(config, "attention_bias", False))
        layer.attention_bias = True
    return layer


class SppLlamaDecoderLayer(LlamaDecoderLayer):
    """A Llama layer of its own shape."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        config = config or vllm_config.model_config.hf_config
        super().__init__(
            vllm_config=vllm_config, prefix=prefix, config=layer_config(config, prefix)
        )


class SppLlamaForCausalLM(LlamaForCausalLM):
    """Llama with a shape of its own in every layer."""

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None) -> Any:
        return LlamaModel(vllm_config=vllm_config, prefix=prefix, layer_type=SppLlamaDecoderLayer)


class SppMistralDecoderLayer(MistralDecoderLayer):
    """A Mistral layer of its own shape."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        config = config or vllm_config.model_config.hf_config
        super().__init__(
            vllm_config=vllm_config, prefix=prefix, config=layer_config(config, prefix)
        )


class SppMistralForCausalLM(MistralForCausalLM):
    """Mistral with a shape of its own in every layer."""

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None) -> Any:
        return MistralModel(
            vllm_config=vllm_config, prefix=prefix, layer_type=SppMistralDecoderLayer
        )


class SppQwen2DecoderLayer(LlamaDecoderLayer):
    """A Qwen2 layer of its own shape: a Llama layer whose q, k and v have a bias."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        config = config or vllm_config.model_config.hf_config
        layer = layer_config(config, prefix)
        layer.qkv_bias = True
        super().__init__(vllm_config=vllm_config, prefix=prefix, config=layer)


class SppQwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 with a shape of its own in every layer."""

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None) -> Any:
        return LlamaModel(vllm_config=vllm_config, prefix=prefix, layer_type=SppQwen2DecoderLayer)


class SppQwen3DecoderLayer(Qwen3DecoderLayer):
    """A Qwen3 layer of its own shape."""

    def __init__(self, config: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        layer = layer_config(config, prefix)
        if getattr(config, "biased_projections", None):
            raise ValueError("vLLM's Qwen3 has no bias on o_proj. Export with --compensate lstsq.")
        super().__init__(layer, *args, prefix=prefix, **kwargs)


class SppQwen3Model(Qwen3Model):
    """The decoder of Qwen3 with a shape of its own in every layer."""

    decoder_layer_type = SppQwen3DecoderLayer


class SppQwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3 with a shape of its own in every layer; vLLM's Llama has the same head."""

    hf_to_vllm_mapper = Qwen3Model.hf_to_vllm_mapper

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None) -> Any:
        return SppQwen3Model(vllm_config=vllm_config, prefix=prefix)
