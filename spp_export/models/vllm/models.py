"""vLLM's decoders with a config of its own for every layer.

Everything but the shapes is vLLM's: fused projections, its attention and KV cache, LoRA, pipeline
and tensor parallelism. Qwen2 runs on the Llama layers, which are the same but for biases and take
the size of a head from the config; vLLM's Qwen2 derives it from the hidden size.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralDecoderLayer, MistralForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer, Qwen3Model
from vllm.model_executor.models.utils import extract_layer_index

_OUTPUT = "self_attn.o_proj"
_OTHERWISE = (
    "Run it with --model-impl transformers --trust-remote-code, or export with --compensate lstsq."
)


def layer_config(config: Any, prefix: str) -> Any:
    """The config of the layer that `prefix` names, with the biases of bias compensation.

    Raises ValueError for a bias that vLLM's layers cannot have by itself, for groups of different
    sizes, and for a layer without attention or MLP.
    """
    index = extract_layer_index(prefix)
    layer = copy.copy(config.layer_config(index))
    if len(set(getattr(layer, "query_groups", None) or ())) > 1:
        raise ValueError(
            f"layer {index}: its KV heads serve different numbers of query heads, which vLLM's "
            "attention does not know. Export with --layout ragged --pad."
        )
    for key, what in (("num_attention_heads", "attention"), ("intermediate_size", "MLP")):
        if getattr(layer, key) == 0:
            raise ValueError(
                f"layer {index} has no {what}, and all of vLLM's layers have one. "
                "Plan with --no-allow-empty-layers."
            )
    biased = set(getattr(config, "biased_projections", None) or ())
    if biased - {_OUTPUT}:
        raise ValueError(
            f"layer {index}: vLLM's own layers have no bias on {min(biased - {_OUTPUT})} alone. "
            f"{_OTHERWISE}"
        )
    if biased:
        # vLLM gives o_proj a bias with attention_bias, and q, k and v one with qkv_bias instead
        # where the config has that.
        layer.qkv_bias = bool(getattr(config, "attention_bias", False))
        layer.attention_bias = True
    return layer


class _OwnShape:
    """Put before a layer of vLLM's, gives it the config of its own place."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        layer = self.adapted(layer_config(config or vllm_config.model_config.hf_config, prefix))
        parent: Any = super()
        parent.__init__(vllm_config=vllm_config, prefix=prefix, config=layer)

    def adapted(self, layer: Any) -> Any:
        """The config that vLLM's layer is to see."""
        return layer


class _OwnLayers:
    """Put before a causal model of vLLM's, builds it of layers of `layer_class`."""

    layer_class: ClassVar[Any]

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None) -> Any:
        parent: Any = super()
        return parent._init_model(
            vllm_config=vllm_config, prefix=prefix, layer_type=self.layer_class
        )


class SppLlamaDecoderLayer(_OwnShape, LlamaDecoderLayer):
    """A Llama layer of its own shape."""


class SppLlamaForCausalLM(_OwnLayers, LlamaForCausalLM):
    """Llama with a shape of its own in every layer."""

    layer_class = SppLlamaDecoderLayer


class SppMistralDecoderLayer(_OwnShape, MistralDecoderLayer):
    """A Mistral layer of its own shape."""


class SppMistralForCausalLM(_OwnLayers, MistralForCausalLM):
    """Mistral with a shape of its own in every layer."""

    layer_class = SppMistralDecoderLayer


class SppQwen2DecoderLayer(_OwnShape, LlamaDecoderLayer):
    """A Qwen2 layer of its own shape: a Llama layer whose q, k and v have a bias."""

    def adapted(self, layer: Any) -> Any:
        """With biases of q, k and v, as vLLM's Llama is told of them."""
        layer.qkv_bias = True
        return layer


class SppQwen2ForCausalLM(_OwnLayers, LlamaForCausalLM):
    """Qwen2 with a shape of its own in every layer."""

    layer_class = SppQwen2DecoderLayer


class SppQwen3DecoderLayer(Qwen3DecoderLayer):
    """A Qwen3 layer of its own shape."""

    def __init__(self, config: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        layer = layer_config(config, prefix)
        # Without a word it leaves out one that a checkpoint has.
        if config.attention_bias or getattr(config, "biased_projections", None):
            raise ValueError(f"vLLM's own Qwen3 layers have no bias on o_proj. {_OTHERWISE}")
        super().__init__(layer, *args, prefix=prefix, **kwargs)


class SppQwen3Model(Qwen3Model):
    """The decoder of Qwen3 with a shape of its own in every layer."""

    decoder_layer_type = SppQwen3DecoderLayer


class SppQwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3 with a shape of its own in every layer; vLLM's Llama has the same head."""

    hf_to_vllm_mapper = Qwen3Model.hf_to_vllm_mapper

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None) -> Any:
        return SppQwen3Model(vllm_config=vllm_config, prefix=prefix)
