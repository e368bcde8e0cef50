"""The records of all families. base.py says what a field means; other names are Llama's."""

from __future__ import annotations

from typing import Any

from spp_export.models.families.base import Family, Feature

_BIASES: Any = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
_TIED = {"tie_word_embeddings": True}
_LAYER_NORM = Feature.LAYER_NORM
_SANDWICH: Any = {
    "mlp_norm": "pre_feedforward_layernorm",
    "more_norms": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
_GEMMA = {Feature.SHIFTED_NORM, Feature.ACTIVATION, Feature.MULTIPLIERS}
_GATE_UP: Any = {"gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj"}


def _features(*features: Feature) -> frozenset[Feature]:
    return frozenset(features)


# fmt: off
FAMILIES = (
    Family("llama", "LlamaForCausalLM", **_BIASES, mlp_bias="mlp_bias",
           heads_divide_hidden=True, end_token=2),
    Family("mistral", "MistralForCausalLM", sliding="all", end_token=2),
    Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True, sliding="listed"),
    Family("qwen3", "Qwen3ForCausalLM", **_BIASES, qk_norm=True, sliding="listed",
           defaults={"head_dim": 128}),

    Family("granite", "GraniteForCausalLM", _features(Feature.MULTIPLIERS), **_BIASES,
           mlp_bias="mlp_bias", end_token=2),
    Family("seed_oss", "SeedOssForCausalLM", qkv_bias="attention_bias",
           output_bias="attention_out_bias", mlp_bias="mlp_bias",
           defaults={"attention_bias": True, "head_dim": 128}, end_token=2),
    Family("ernie4_5", "Ernie4_5ForCausalLM", _features(Feature.ROTARY), qkv_bias="use_bias",
           output_bias="use_bias", mlp_bias="use_bias", rope_theta=500000.0,
           defaults={"head_dim": 128, **_TIED}, end_token=2),
    Family("smollm3", "SmolLM3ForCausalLM", _features(Feature.ROTARY), **_BIASES,
           mlp_bias="mlp_bias", rope_theta=2000000.0, defaults=_TIED, sliding="listed",
           end_token=128001),
    Family("ministral", "MinistralForCausalLM", sliding="listed", end_token=2),
    Family("ministral3", "Ministral3ForCausalLM", _features(Feature.ROTARY), rope_theta=None,
           defaults={"head_dim": 128}, sliding="all", end_token=2),
    Family("cwm", "CwmForCausalLM", mlp_bias="mlp_bias", heads_divide_hidden=True,
           rope_theta=None, defaults={"head_dim": 128}, sliding="listed",
           end_token=(128001, 128008, 128009)),
    Family("hyperclovax", "HyperCLOVAXForCausalLM",
           _features(Feature.MULTIPLIERS, Feature.SANDWICH), **_BIASES, mlp_bias="mlp_bias",
           heads_divide_hidden=True, defaults={"use_post_norm": True},
           more_norms=("post_norm1?use_post_norm", "post_norm2?use_post_norm"), end_token=2),
    Family("arcee", "ArceeForCausalLM", _features(Feature.NO_GATE), **_BIASES,
           mlp_bias="mlp_bias", gate="", heads_divide_hidden=True, end_token=128001),
    Family("nemotron", "NemotronForCausalLM",
           _features(Feature.NO_GATE, _LAYER_NORM, Feature.SHIFTED_NORM, Feature.ROTARY),
           **_BIASES, mlp_bias="mlp_bias", gate="", norm_bias=True, end_token=3),
    Family("starcoder2", "Starcoder2ForCausalLM", _features(Feature.NO_GATE, _LAYER_NORM),
           qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias", norm_bias=True,
           gate="", up="mlp.c_fc", down="mlp.c_proj", sliding="all",
           defaults={"use_bias": True, **_TIED}, end_token=50256),
    Family("exaone4", "Exaone4ForCausalLM", _features(Feature.SANDWICH, Feature.ROTARY),
           qk_norm=True, attention_norm="", mlp_norm="",
           more_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
           sliding="listed", end_token=2),
    Family("cohere", "CohereForCausalLM",
           _features(Feature.PARALLEL, _LAYER_NORM, Feature.MULTIPLIERS, Feature.ROTARY), **_BIASES,
           qk_norm="use_qk_norm", head_norms=True, mlp_norm="", rope_theta=500000.0,
           defaults=_TIED, end_token=255001),
    Family("cohere2", "Cohere2ForCausalLM",
           _features(Feature.PARALLEL, _LAYER_NORM, Feature.MULTIPLIERS, Feature.ROTARY), **_BIASES,
           mlp_norm="", defaults=_TIED, sliding="listed", derived_head_dim="config",
           end_token=255001),
    Family("gemma", "GemmaForCausalLM", frozenset(_GEMMA), **_BIASES,
           defaults={"head_dim": 256, **_TIED}, end_token=1),
    Family("gemma2", "Gemma2ForCausalLM", _features(*_GEMMA, Feature.SANDWICH, Feature.SOFTCAP),
           **_BIASES, **_SANDWICH, heads_divide_hidden=True, sliding="listed",
           defaults={"head_dim": 256, **_TIED}, end_token=1),
    Family("gemma3_text", "Gemma3ForCausalLM",
           _features(*_GEMMA, Feature.SANDWICH, Feature.SOFTCAP, Feature.ROTARY), **_BIASES,
           **_SANDWICH, qk_norm=True, heads_divide_hidden=True, sliding="listed", rope_theta=None,
           config_class="Gemma3TextConfig", decoder_class="Gemma3TextModel",
           defaults={"head_dim": 256, **_TIED}, end_token=1),
    Family("olmo", "OlmoForCausalLM", _features(_LAYER_NORM, Feature.BARE_NORM), **_BIASES,
           norm_weight=False, end_token=50279),
    Family("phi", "PhiForCausalLM",
           _features(Feature.PARALLEL, Feature.NO_GATE, _LAYER_NORM, Feature.ROTARY),
           qkv_bias=True, output_bias=True, mlp_bias=True, norm_bias=True, head_bias=True,
           output="self_attn.dense", gate="", up="mlp.fc1", down="mlp.fc2", mlp_norm="",
           final_norm="model.final_layernorm", refused=("qk_layernorm",), end_token=2),
    Family("phi3", "Phi3ForCausalLM", _features(Feature.FUSED, Feature.ROTARY),
           query="self_attn.qkv_proj", key="self_attn.qkv_proj", value="self_attn.qkv_proj",
           **_GATE_UP, sliding="all", end_token=32000),
    Family("glm", "GlmForCausalLM", _features(Feature.FUSED, Feature.ROTARY),
           qkv_bias="attention_bias", **_GATE_UP,
           defaults={"attention_bias": True, "head_dim": 128},
           end_token=(151329, 151336, 151338)),
    Family("glm4", "Glm4ForCausalLM", _features(Feature.FUSED, Feature.ROTARY, Feature.SANDWICH),
           qkv_bias="attention_bias", **_GATE_UP,
           more_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
           defaults={"attention_bias": True, "head_dim": 128},
           end_token=(151329, 151336, 151338)),
    Family("stablelm", "StableLmForCausalLM",
           _features(_LAYER_NORM, Feature.PARALLEL, Feature.ROTARY), qkv_bias="use_qkv_bias",
           norm_bias=True, mlp_norm="",
           more_norms=("post_attention_layernorm?!use_parallel_residual",),
           derived_head_dim="attention", refused=("qk_layernorm",), end_token=0),
    Family("jais2", "Jais2ForCausalLM", _features(Feature.NO_GATE, _LAYER_NORM), **_BIASES,
           mlp_bias="mlp_bias", norm_bias=True, gate="", heads_divide_hidden=True,
           defaults={"attention_bias": True, "mlp_bias": True}, end_token=150024),
    Family("apertus", "ApertusForCausalLM", _features(Feature.NO_GATE), **_BIASES, qk_norm=True,
           gate="", attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm",
           rope_theta=None, end_token=2, fixed={
               "mlp.act_fn.alpha_p": (1,), "mlp.act_fn.alpha_n": (1,),
               "mlp.act_fn.beta": (), "mlp.act_fn.eps": ()}),
    Family("nanochat", "NanoChatForCausalLM",
           _features(Feature.NO_GATE, Feature.BARE_NORM, Feature.SOFTCAP, Feature.ROTARY),
           **_BIASES, gate="", up="mlp.fc1", down="mlp.fc2", norm_weight=False, end_token=1),
)
# fmt: on
