"""Tiny random models of every family of the table, and slices of them by the record alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from factories import VOCAB, random_layers, write_tokenizer
from old_transformers import OLD, in_its_words
from transformers import CONFIG_MAPPING, AutoConfig

from spp_export.evaluation.contract import (
    Pair,
    drop_experts,
    greedy,
    make_slim,
    narrow_experts,
    only_existing,
    padded,
    tokens,
    write_random,
)
from spp_export.evaluation.contract import load_exact as load
from spp_export.formats.registry import FORMATS
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.families import FAMILIES, Family
from spp_export.planning import LayerPlan, Layout

__all__ = ["KNOWN", "Pair", "greedy", "load", "make_dense", "make_slim", "padded", "tokens"]

# Two kinds of layers, and small gated delta nets.
MIXED = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
}
DELTA: dict[str, Any] = {
    **MIXED,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
LATENTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# Gemma 4: heads of two sizes, embeddings of every layer, the last two layers read others' keys.
SHARING: dict[str, Any] = {
    "layer_types": ["sliding_attention"] * 2 + ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 97,
    "final_logit_softcapping": 5.0,
}
VALUES: dict[str, Any] = {
    **SHARING,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
# Two groups of experts, one of which sees a token.
GROUPS: dict[str, Any] = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}
# What shows more of a family than its defaults do.
MORE: dict[str, dict[str, Any]] = {
    "granite": {
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 3.0,
        "embedding_multiplier": 2.0,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "hyperclovax": {"residual_multiplier": 0.7, "logits_scaling": 3.0},
    "seed_oss": {"attention_out_bias": True},
    "smollm3": {"no_rope_layers": [1, 0]},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": SHARING,
    "ernie4_5": {"use_bias": True},
    "stablelm": {"use_qkv_bias": True, "use_parallel_residual": True},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "granitemoe": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 3.0},
    "glm4_moe": {"attention_bias": True, "use_qk_norm": True, "first_k_dense_replace": 1},
    "dots1": {"layer_types": ["sliding_attention", "full_attention"]},
    # Those of transformers 4 have biases in their experts, too.
    "ernie4_5_moe": {"use_bias": not OLD, "moe_layer_start_index": 1},
    "llama4_text": {
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 5,
        "floor_scale": 4,
    },
    "gpt_neox": {"rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}},
    "gptj": {"rotary_dim": 4},
    "falcon": {"multi_query": False, "bias": True, "num_kv_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "olmo": {"clip_qkv": 2.0, "attention_bias": True},
    "qwen3_5_text": {**DELTA, "attention_bias": True},
    "qwen3_next": {**DELTA, "mlp_only_layers": [2]},
    "qwen3_5_moe_text": DELTA,
    "deepseek_v3": {**LATENTS, "attention_bias": True, "num_hidden_layers": 2},
    "deepseek_v2": LATENTS,
    "minimax": {
        **MIXED,
        "block_size": 4,
        "full_attn_alpha_factor": 1.5,
        "full_attn_beta_factor": 0.7,
        "mlp_beta_factor": 0.8,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_hidden_layers": 3,
        "block_multiple_of": 8,
        "conv_bias": True,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 4,
        "mlp_bias": True,
    },
    "falcon_h1": {
        "mamba_d_ssm": 24,
        "mamba_n_heads": 4,
        "mamba_d_head": 6,
        "mamba_n_groups": 2,
        "mamba_d_state": 8,
        "mamba_chunk_size": 4,
        "mamba_rms_norm": True,
        "mamba_proj_bias": True,
        "key_multiplier": 0.5,
        "attention_out_multiplier": 0.7,
        "mlp_multipliers": [0.9, 0.8],
        "lm_head_multiplier": 2.0,
        "attention_bias": True,
    },
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": {"clip_qkv": 2.0},
    "minimax_m2": {"rotary_dim": 4},
}
# Sizes that the families of experts have beside those of every family.
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_5_moe_text": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 20,
    },
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    },
    "deepseek_v2": {
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    },
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 20,
        "intermediate_size_mlp": 40,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_num_shared_experts": 2,
        "moe_k": 2,
        "moe_intermediate_size": 12,
    },
}
# Other forms of a family, by a name of their own.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2-lite": ("deepseek_v2", {**LATENTS, "q_lora_rank": None}),
    "opt-350m": ("opt", {"word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "opt-bare": ("opt", {"layer_norm_elementwise_affine": False, "enable_bias": False}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "falcon-7b": ("falcon", {}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True}),
    "falcon-11b": ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    "falcon-rw": (
        "falcon",
        {"multi_query": False, "alibi": True, "num_kv_heads": 4, "parallel_attn": False},
    ),
    "gpt_bigcode-heads": ("gpt_bigcode", {"multi_query": False}),
    "deepseek_v3-groups": ("deepseek_v3", {**LATENTS, **GROUPS}),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {**LATENTS, **GROUPS, "topk_method": "group_limited_greedy"},
    ),
    "gemma4-wide": (
        "gemma4_text",
        {**SHARING, "use_double_wide_mlp": True, "attention_bias": True},
    ),
    "gemma4-values": ("gemma4_text", VALUES),
    "gemma4-experts": (
        "gemma4_text",
        {
            **VALUES,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 12,
        },
    ),
    "glm4_moe-groups": ("glm4_moe", GROUPS),
    "dots1-groups": ("dots1", GROUPS),
    "persimmon-bare": ("persimmon", {"qk_layernorm": False}),
}
# Of those, what this version of transformers has.
KNOWN = [name for name in FAMILIES if name in CONFIG_MAPPING]


def layouts(family: Family) -> Iterator[Layout]:
    """Those that a family can have; `uniform` where its stock config takes fewer heads."""
    if FORMATS["safetensors"].refusal(family, "ragged") is None:
        yield "ragged"
    yield "per-layer"
    if family.uniform == "all":
        yield "uniform"


def family_name(name: str) -> str:
    """The family of a form, or the family itself."""
    return FORMS[name][0] if name in FORMS else name


def make_dense(
    name: str, target: Path, head_dim: int = 8, vocab: int = 97, layers: int = 2, **more: Any
) -> Path:
    """A random model of a family or one of its forms, of four heads, made by the stock classes.

    `more` are other values of its config.
    """
    settings = settings_of(name, head_dim, vocab, layers)
    for key, value in more.items():
        setattr(settings, key, value)
    return write_random(settings, target)


def settings_of(name: str, head_dim: int = 8, vocab: int = 97, layers: int = 2) -> Any:
    """The tiny config of a family or of one of its forms; `layers` is even, for the kinds of
    layers take turns."""
    family, more = FORMS.get(name, (name, MORE.get(name, {})))
    more = {
        key: value * (layers // 2) if key in ("layer_types", "no_rope_layers") else value
        for key, value in more.items()
    }
    sizes = {"hidden_size": 4 * head_dim, "intermediate_size": 24}
    sizes |= {"vocab_size": vocab, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    record = FAMILIES[family]
    more = EXPERTS.get(family, {}) | in_its_words(more, record.keys)
    named = {record.keys.get(key, key): value for key, value in (sizes | heads).items()}
    named.pop("", None)
    if record.derived_head_dim == "attention":
        del named["head_dim"]
    settings = AutoConfig.for_model(family, **{**named, **tokens, **more})
    if getattr(settings, "sliding_window", None):
        settings.sliding_window = 5
    return settings


def slim_experts(name: str, place: Path) -> Path:
    """A slice with a tokenizer, whose layers differ in heads, in experts and in the width of
    these."""
    place.mkdir(parents=True, exist_ok=True)
    source = open_source(make_dense(name, place / "dense", head_dim=16, vocab=VOCAB))
    layers = random_layers(source.shape, 5, channels=False)
    layers = narrow_experts(drop_experts(layers, source.shape, 5), source.shape, 5)
    layers = only_existing(layers, source.shape)
    slim = make_slim(source, "per-layer", place / "slim", layers).slim
    write_tokenizer(slim)
    return slim


def emptied(
    layers: Sequence[LayerPlan], attention: Collection[int], mlp: Collection[int]
) -> tuple[LayerPlan, ...]:
    """The layers, those listed without attention or without an MLP."""
    return tuple(
        replace(
            layer,
            kv_heads=() if index in attention else layer.kv_heads,
            query_heads=() if index in attention else layer.query_heads,
            channels=() if index in mlp else layer.channels,
        )
        for index, layer in enumerate(layers)
    )
