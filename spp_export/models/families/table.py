"""The records of all families. base.py says what a field means; other names are Llama's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spp_export.models.families.base import Family, Feature
from spp_export.models.families.experts import Experts
from spp_export.models.families.gemma4 import GEMMA4
from spp_export.models.families.mixers import Mixers
from spp_export.models.families.vision import Wrapper

_BIASES: Any = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
_TIED = {"tie_word_embeddings": True}
_LAYER_NORM = Feature.LAYER_NORM
_SANDWICH: Any = {
    "mlp_norm": "pre_feedforward_layernorm",
    "more_norms": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
_POST_NORMS: Any = {
    "attention_norm": "",
    "mlp_norm": "",
    "more_norms": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
_GEMMA = {Feature.SHIFTED_NORM, Feature.ACTIVATION, Feature.MULTIPLIERS}
# A model that sees what follows a token, as those do that embed texts.
_BOTH_WAYS = ("use_bidirectional_attention",)
_POSITIONS = Feature.POSITIONS
# Every query head has a KV head of its own.
_EVERY_HEAD = {"num_key_value_heads": ""}


def _fused(module: str) -> Any:
    """Queries, keys and values in one tensor."""
    return {"query": module, "key": module, "value": module}


def _opt(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"embedding_size": config.get("word_embed_proj_dim")}


def four_times(config: Mapping[str, Any], ratio: Any = 4) -> Mapping[str, Any]:
    """The width of the MLP, where config.json does not say it."""
    hidden, width = config.get("hidden_size"), config.get("intermediate_size")
    known = isinstance(hidden, int) and isinstance(ratio, int)
    return {"intermediate_size": ratio * hidden if width is None and known else width}


def _mpt(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return four_times(config, config.get("expansion_ratio"))


def _bigcode(config: Mapping[str, Any]) -> Mapping[str, Any]:
    one = config.get("multi_query")
    return {**four_times(config), "num_key_value_heads": 1 if one else None}


def _falcon(config: Mapping[str, Any]) -> Mapping[str, Any]:
    grouped = config.get("new_decoder_architecture")
    kv_heads = config.get("num_key_value_heads") if grouped else None
    if not grouped and config.get("multi_query"):
        kv_heads = 1
    two = grouped and config.get("num_ln_in_parallel_attn") in (None, 2)
    return {**four_times(config), "num_key_value_heads": kv_heads, "two_norms": bool(two)}


_4H: Any = {"gate": "", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
_TRANSFORMER: Any = {
    "layers": "transformer.h",
    "final_norm": "transformer.ln_f",
    "norm_bias": True,
    "rope_theta": None,
    "derived_head_dim": "attention",
}
# The names of config.json in GPT-2 and what follows it, and those of its modules.
_N_KEYS = {
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}
_GPT2: Any = {
    **_fused("attn.c_attn"),
    "output": "attn.c_proj",
    "gate": "",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "attention": "attn",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "derive": four_times,
    "defaults": {"n_positions": 1024, **_TIED},
    "refused": ("add_cross_attention",),
    "obsolete": ("attn.bias", "attn.masked_bias"),
    "end_token": 50256,
}
_QK_NORMS: Any = {"wide_norms": {"self_attn.q_norm": "Q", "self_attn.k_norm": "K"}}
_GATE_UP: Any = {"gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj"}

# Where every layer has experts.
_NO_MLP: Any = {"gate": "", "up": "", "down": ""}


def _mlp(place: str, width: str, bias: str = "") -> dict[str, str]:
    """Tensors of an expert, or of an MLP beside experts, of which nothing is cut; with biases if
    that key is true."""
    wide = {f"{place}.{name}": f"{width} hidden_size" for name in ("gate_proj", "up_proj")}
    weights = {**wide, f"{place}.down_proj": f"hidden_size {width}"}
    biases = {f"{name}.bias?{bias}": size.split()[0] for name, size in weights.items()}
    return {f"{name}.weight": size for name, size in weights.items()} | (biases if bias else {})


# How many experts there are, and how many of them see a token.
_COUNTS = ("num_experts|num_local_experts", "num_experts_per_tok")
_ROUTED = ("n_routed_experts|num_experts|num_local_experts", "num_experts_per_tok")
_EACH = {
    "mlp.gate.weight": f"{_COUNTS[0]} hidden_size",
    **_mlp("mlp.experts.*", "moe_intermediate_size"),
}
_WITH_SHARED = {
    **_EACH,
    "mlp.shared_expert_gate.weight": "1 hidden_size",
    **_mlp("mlp.shared_expert", "shared_expert_intermediate_size"),
}
_SCORED = {
    **_EACH,
    "mlp.gate.weight": f"{_ROUTED[0]} hidden_size",
    "mlp.gate.e_score_correction_bias": _ROUTED[0],
    **_mlp("mlp.shared_experts", "moe_intermediate_size*n_shared_experts"),
}
_WIDTH: Any = {"width": "moe_intermediate_size"}
_STEPS: Any = {**_WIDTH, "every": "decoder_sparse_step", "never": "mlp_only_layers"}
_FIRST: Any = {**_WIDTH, "first": "first_k_dense_replace", "groups": ("n_group", "topk_group")}
_LOCAL = ("num_local_experts|num_experts", "num_experts_per_tok")
_BLOCK: Any = {
    "modules": ("mlp", "block_sparse_moe"),
    "width": "intermediate_size",
    "down": "w2",
}
_BLOCK_SPARSE = {
    "block_sparse_moe.gate.weight": "num_local_experts|num_experts hidden_size",
    "block_sparse_moe.experts.*.w1.weight": "intermediate_size hidden_size",
    "block_sparse_moe.experts.*.w2.weight": "hidden_size intermediate_size",
    "block_sparse_moe.experts.*.w3.weight": "intermediate_size hidden_size",
}


def _by_interval(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The kinds of layers of Qwen3-Next and what follows it, where config.json lists none."""
    count, every = config.get("num_hidden_layers"), config.get("full_attention_interval", 4)
    if config.get("layer_types") is not None or not isinstance(count, int):
        return {}
    if not isinstance(every, int) or every < 1:
        return {}
    kinds = ("full_attention", "linear_attention")
    return {"layer_types": [kinds[bool((index + 1) % every)] for index in range(count)]}


def _delta_nets(*projections: str) -> Mixers:
    """Gated delta nets (arXiv 2412.06464), whose projections' outputs are these."""
    keys = "linear_num_key_heads*linear_key_head_dim"
    values = "linear_num_value_heads*linear_value_head_dim"
    named = {"qkvz": f"2*{keys}+2*{values}", "ba": "2*linear_num_value_heads"}
    named |= {"qkv": f"2*{keys}+{values}", "z": values}
    named |= dict.fromkeys(("a", "b"), "linear_num_value_heads")
    return Mixers(
        "gated delta nets",
        {
            **{
                f"linear_attn.in_proj_{name}.weight": f"{named[name]} hidden_size"
                for name in projections
            },
            "linear_attn.conv1d.weight": f"{named['qkv']} 1 linear_conv_kernel_dim",
            "linear_attn.dt_bias": "linear_num_value_heads",
            "linear_attn.A_log": "linear_num_value_heads",
            "linear_attn.norm.weight": "linear_value_head_dim",
            "linear_attn.out_proj.weight": f"hidden_size {values}",
        },
        kinds=("linear_attention",),
        heads=("full_attention",),
    )


# What Qwen3-Next's attention and the models after it have in common.
_QWEN_NEXT: Any = {
    **_BIASES,
    "qk_norm": True,
    "query_rows": "2*head_dim",
    "derive": _by_interval,
}
_QWEN_NEXT_FEATURES = {Feature.MIXERS, Feature.GATED, Feature.SHIFTED_NORM, Feature.ROTARY}
_QWEN_NEXT_SIZES = {
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}


def _latents(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Whether MLA makes its queries of latents, and whether these projections have a bias."""
    made = config.get("q_lora_rank") is not None
    return {"q_latents": made, "q_latents_bias": made and config.get("attention_bias") is True}


# Multi-head latent attention (arXiv 2405.04434): each head has a query, and a key and a value of
# its own, of which it has rows in two projections that read latents.
_MLA: Any = {
    "output_bias": "attention_bias",
    "query": "self_attn.q_b_proj",
    "key": "self_attn.kv_b_proj",
    "value": "",
    "query_rows": "qk_nope_head_dim+qk_rope_head_dim",
    "key_rows": "qk_nope_head_dim+v_head_dim",
    "query_inputs": "q_lora_rank",
    "key_inputs": "kv_lora_rank",
    "cached": "kv_lora_rank+qk_rope_head_dim",
    "keys": {"head_dim": "v_head_dim"},
    "derive": _latents,
    "variants": (("!q_latents", {"query": "self_attn.q_proj", "query_inputs": ""}),),
    "mixers": Mixers(
        "the latents of attention (MLA)",
        {
            "self_attn.q_a_proj.weight?q_latents": "q_lora_rank hidden_size",
            "self_attn.q_a_proj.bias?q_latents_bias": "q_lora_rank",
            "self_attn.q_a_layernorm.weight?q_latents": "q_lora_rank",
            "self_attn.kv_a_proj_with_mqa.weight": "kv_lora_rank+qk_rope_head_dim hidden_size",
            "self_attn.kv_a_proj_with_mqa.bias?attention_bias": "kv_lora_rank+qk_rope_head_dim",
            "self_attn.kv_a_layernorm.weight": "kv_lora_rank",
        },
    ),
}
_MLA_SIZES = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}


def _lfm2(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """LFM2's kinds of layers where config.json lists those with attention alone, and the width of
    its MLPs, which follows from the one that it says."""
    found: dict[str, Any] = {}
    count, attending = config.get("num_hidden_layers"), config.get("full_attn_idxs")
    if config.get("layer_types") is None and isinstance(count, int):
        attending = range(count) if attending is None else attending
        kinds = ("conv", "full_attention")
        found["layer_types"] = [kinds[index in attending] for index in range(count)]
    width, multiple = config.get("intermediate_size"), config.get("block_multiple_of")
    numbers = isinstance(width, int) and isinstance(multiple, int)
    if numbers and width and multiple and config.get("block_auto_adjust_ff_dim"):
        factor: Any = config.get("block_ffn_dim_multiplier")
        width = int(2 * width / 3)
        if isinstance(factor, (int, float)):
            width = multiple * -(-int(factor * width) // multiple)
        found["intermediate_size"] = width
    return found


def _minimax(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The size of heads, and the kinds of layers, where config.json says neither."""
    found: dict[str, Any] = {}
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if config.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int):
        found["head_dim"] = hidden // max(heads, 1)
    count = config.get("num_hidden_layers")
    if config.get("layer_types") is None and isinstance(count, int):
        kinds = ("full_attention", "linear_attention")
        found["layer_types"] = [kinds[index % 2] for index in range(count)]
    return found


_LIGHTNING = "num_attention_heads*head_dim"


def _falcon_h1(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The width of its Mamba mixers."""
    width, hidden = config.get("mamba_d_ssm"), config.get("hidden_size")
    expand = config.get("mamba_expand")
    if width is None and isinstance(hidden, int) and isinstance(expand, (int, float)):
        width = int(expand * hidden)
    return {"ssm_width": width}


def _mamba2(
    place: str, width: str, groups: str, state: str, heads: str, kernel: str, **flags: str
) -> dict[str, str]:
    """Tensors of a Mamba-2 mixer (arXiv 2405.21060) by the keys of its sizes; flags: of biases of
    its convolution, of in_proj and of out_proj, and of its norm."""
    convolved = f"{width}+2*{groups}*{state}"
    made = f"{width}+{convolved}+{heads}"
    norm = f"?{flags['norm']}" if "norm" in flags else ""
    return {
        f"{place}.conv1d.weight": f"{convolved} 1 {kernel}",
        f"{place}.conv1d.bias?{flags['conv']}": convolved,
        f"{place}.in_proj.weight": f"{made} hidden_size",
        f"{place}.in_proj.bias?{flags['enter']}": made,
        **{f"{place}.{name}": heads for name in ("dt_bias", "A_log", "D")},
        f"{place}.norm.weight{norm}": width,
        f"{place}.out_proj.weight": f"hidden_size {width}",
        f"{place}.out_proj.bias?{flags['leave']}": "hidden_size",
    }


_BLOCKS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_RENAMED = {"mamba": "linear_attention", "attention": "full_attention"}


def _nemotron_h(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The kinds of layers, which config.json lists or writes as a pattern, and how many they are;
    the width of the Mamba mixers."""
    kinds, pattern = config.get("layers_block_type"), config.get("hybrid_override_pattern")
    if kinds is None and isinstance(pattern, str):
        kinds = [_BLOCKS.get(letter, letter) for letter in pattern]
    found: dict[str, Any] = {}
    if isinstance(kinds, list):
        kinds = [_RENAMED.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
        found = {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    heads, size = config.get("mamba_num_heads"), config.get("mamba_head_dim")
    if isinstance(heads, int) and isinstance(size, int):
        found["mamba_width"] = heads * size
    return found


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
           mlp_bias="mlp_bias", scaled_logits="divided", end_token=2),
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
           heads_divide_hidden=True, scaled_logits="multiplied", defaults={"use_post_norm": True},
           more_norms=("post_norm1?use_post_norm", "post_norm2?use_post_norm"), end_token=2,
           variants=(("!use_post_norm", {"features": _features(Feature.SANDWICH)}),)),
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
           qk_norm=True, **_POST_NORMS, sliding="listed", end_token=2),
    Family("cohere", "CohereForCausalLM",
           _features(Feature.PARALLEL, _LAYER_NORM, Feature.MULTIPLIERS, Feature.ROTARY), **_BIASES,
           qk_norm="use_qk_norm", head_norms=True, mlp_norm="", rope_theta=500000.0,
           defaults=_TIED, end_token=255001),
    Family("cohere2", "Cohere2ForCausalLM",
           _features(Feature.PARALLEL, _LAYER_NORM, Feature.MULTIPLIERS, Feature.ROTARY), **_BIASES,
           mlp_norm="", defaults=_TIED, sliding="listed", derived_head_dim="config",
           end_token=255001),
    Family("gemma", "GemmaForCausalLM", frozenset(_GEMMA), **_BIASES, refused=_BOTH_WAYS,
           defaults={"head_dim": 256, **_TIED}, end_token=1),
    Family("gemma2", "Gemma2ForCausalLM", _features(*_GEMMA, Feature.SANDWICH, Feature.SOFTCAP),
           **_BIASES, **_SANDWICH, heads_divide_hidden=True, sliding="listed",
           refused=_BOTH_WAYS, defaults={"head_dim": 256, **_TIED}, end_token=1),
    Family("gemma3_text", "Gemma3ForCausalLM",
           _features(*_GEMMA, Feature.SANDWICH, Feature.SOFTCAP, Feature.ROTARY), **_BIASES,
           **_SANDWICH, qk_norm=True, heads_divide_hidden=True, sliding="listed", rope_theta=None,
           rope_by_type=True, refused=_BOTH_WAYS,
           config_class="Gemma3TextConfig", decoder_class="Gemma3TextModel",
           defaults={"head_dim": 256, **_TIED}, end_token=1),
    Family("gemma4_text", "Gemma4ForCausalLM",
           _features(Feature.ACTIVATION, Feature.MULTIPLIERS, Feature.SANDWICH, Feature.SOFTCAP,
                     Feature.ROTARY, Feature.MIXERS), **_BIASES, **_SANDWICH, **GEMMA4,
           qk_norm=True, fixed={"layer_scalar": (1,)}, sliding="listed", rope_theta=None,
           rope_by_type=True, end_token=1,
           config_class="Gemma4TextConfig", decoder_class="Gemma4TextModel",
           defaults={
               **_TIED, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
               "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
               "vocab_size": 262144, "vocab_size_per_layer_input": 262144,
               "hidden_size_per_layer_input": 256}),
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
    Family("stablelm", "StableLmForCausalLM", _features(_LAYER_NORM, Feature.ROTARY),
           qkv_bias="use_qkv_bias", norm_bias=True, derived_head_dim="attention",
           variants=(("use_parallel_residual", {
               "features": _features(Feature.PARALLEL), "mlp_norm": ""}),),
           refused=("qk_layernorm",), end_token=0),
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

    Family("olmo2", "Olmo2ForCausalLM", _features(Feature.SANDWICH, Feature.WIDE_NORM), **_BIASES,
           **_POST_NORMS, **_QK_NORMS, end_token=50279),
    Family("olmo3", "Olmo3ForCausalLM",
           _features(Feature.SANDWICH, Feature.WIDE_NORM, Feature.ROTARY), **_BIASES,
           **_POST_NORMS, **_QK_NORMS, rope_theta=None, rope_by_type=True, sliding="listed",
           end_token=50279),
    Family("bitnet", "BitNetForCausalLM", _features(Feature.WIDE_NORM, Feature.ACTIVATION),
           **_BIASES, derived_head_dim="attention", rope_theta=500000.0, end_token=128001,
           wide_norms={"self_attn.attn_sub_norm": "Q", "mlp.ffn_sub_norm": "C"}),

    Family("olmoe", "OlmoeForCausalLM", _features(Feature.EXPERTS, Feature.WIDE_NORM), **_BIASES,
           **_NO_MLP, **_QK_NORMS, derived_head_dim="attention", end_token=50279,
           defaults={"num_local_experts": 64, "num_experts_per_tok": 8},
           experts=Experts({"mlp.gate.weight": f"{_COUNTS[0]} hidden_size",
                            **_mlp("mlp.experts.*", "intermediate_size")}, *_COUNTS,
                           width="intermediate_size")),
    Family("minimax_m2", "MiniMaxM2ForCausalLM",
           _features(Feature.EXPERTS, Feature.WIDE_NORM, Feature.ROTARY), **_NO_MLP, **_QK_NORMS,
           defaults={"head_dim": 128, "num_local_experts": 256, "num_experts_per_tok": 8},
           rope_theta=None, end_token=200020, experts=Experts(
               {**_BLOCK_SPARSE, "block_sparse_moe.e_score_correction_bias": _LOCAL[0]},
               *_LOCAL, **_BLOCK)),
    Family("mixtral", "MixtralForCausalLM", _features(Feature.EXPERTS), **_NO_MLP,
           defaults={"num_local_experts": 8, "num_experts_per_tok": 2}, rope_theta=None,
           sliding="all", end_token=2, experts=Experts(_BLOCK_SPARSE, *_LOCAL, **_BLOCK)),
    Family("phimoe", "PhimoeForCausalLM",
           _features(Feature.EXPERTS, Feature.ROUTER, _LAYER_NORM, Feature.ROTARY), **_BIASES,
           **_NO_MLP, derived_head_dim="attention",
           defaults={"num_local_experts": 16, "num_experts_per_tok": 2}, rope_theta=None,
           norm_bias=True, head_bias="lm_head_bias", sliding="all", end_token=2,
           experts=Experts(_BLOCK_SPARSE, *_LOCAL, **_BLOCK)),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", _features(Feature.EXPERTS), **_BIASES,
           qk_norm=True, defaults={"num_local_experts": 128, "num_experts_per_tok": 8,
                                   "moe_intermediate_size": 768, "decoder_sparse_step": 1},
           sliding="all", experts=Experts(_EACH, *_COUNTS, **_STEPS)),
    Family("qwen2_moe", "Qwen2MoeForCausalLM", _features(Feature.EXPERTS),
           qkv_bias="qkv_bias", sliding="listed", derived_head_dim="attention", defaults={
               "qkv_bias": True, "num_local_experts": 60, "num_experts_per_tok": 4,
               "moe_intermediate_size": 1408, "decoder_sparse_step": 1,
               "shared_expert_intermediate_size": 5632},
           experts=Experts(_WITH_SHARED, *_COUNTS, **_STEPS)),
    Family("gpt_oss", "GptOssForCausalLM",
           _features(Feature.EXPERTS, Feature.SINKS, Feature.ROTARY), **_BIASES, **_NO_MLP,
           head_rows=("self_attn.sinks",), rope_theta=None, sliding="listed", defaults={
               "attention_bias": True, "head_dim": 64, "num_local_experts": 128,
               "num_experts_per_tok": 4},
           experts=Experts({
               "mlp.router.weight": f"{_LOCAL[0]} hidden_size", "mlp.router.bias": _LOCAL[0],
               "mlp.experts.gate_up_proj": "* hidden_size 2*intermediate_size",
               "mlp.experts.gate_up_proj_bias": "* 2*intermediate_size",
               "mlp.experts.down_proj": "* intermediate_size hidden_size",
               "mlp.experts.down_proj_bias": "* hidden_size"}, *_LOCAL,
               width="intermediate_size", side_by_side=True)),
    Family("granitemoe", "GraniteMoeForCausalLM", _features(Feature.EXPERTS, Feature.MULTIPLIERS),
           **_BIASES, **_NO_MLP, defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
           derived_head_dim="attention", scaled_logits="divided", end_token=2, experts=Experts({
               "block_sparse_moe.router.layer.weight": f"{_LOCAL[0]} hidden_size",
               "block_sparse_moe.input_linear.weight": "* 2*intermediate_size hidden_size",
               "block_sparse_moe.output_linear.weight": "* hidden_size intermediate_size"},
               *_LOCAL, **{**_BLOCK, "down": "output_linear"})),
    Family("glm4_moe", "Glm4MoeForCausalLM", _features(Feature.EXPERTS, Feature.ROTARY),
           qkv_bias="attention_bias", qk_norm="use_qk_norm", rope_theta=None,
           defaults={"n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8,
                     "moe_intermediate_size": 1408, "first_k_dense_replace": 1}, single_in_4=True,
           experts=Experts(_SCORED, *_ROUTED, **_FIRST)),
    Family("dots1", "Dots1ForCausalLM", _features(Feature.EXPERTS), **_BIASES,
           qk_norm=True, sliding="listed", single_in_4=True,
           defaults={"first_k_dense_replace": 0, "moe_intermediate_size": 1408},
           experts=Experts(_SCORED, *_ROUTED, **_FIRST)),
    Family("llama4_text", "Llama4ForCausalLM",
           _features(Feature.EXPERTS, Feature.ROUTER, Feature.ROTARY), **_BIASES,
           rope_theta=500000.0, end_token=2, config_class="Llama4TextConfig",
           decoder_class="Llama4TextModel", gate="feed_forward.gate_proj",
           up="feed_forward.up_proj", down="feed_forward.down_proj",
           keys={"intermediate_size": "intermediate_size_mlp"}, defaults={
               "head_dim": 128, "num_local_experts": 16, "num_experts_per_tok": 1,
               "interleave_moe_layer_step": 1, "intermediate_size_mlp": 16384},
           experts=Experts({
               "feed_forward.router.weight": f"{_LOCAL[0]} hidden_size",
               "feed_forward.experts.gate_up_proj": "* hidden_size 2*intermediate_size",
               "feed_forward.experts.down_proj": "* intermediate_size hidden_size",
               **_mlp("feed_forward.shared_expert", "intermediate_size")}, *_LOCAL,
               every="interleave_moe_layer_step", listed="moe_layers",
               modules=("feed_forward",), width="intermediate_size")),
    Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", _features(Feature.EXPERTS, Feature.ROTARY),
           qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias", head_bias="use_bias",
           rope_theta=500000.0, end_token=2, single_in_4=True, defaults={
               **_TIED, "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_k": 6,
               "moe_intermediate_size": 1536, "moe_layer_start_index": 1,
               "moe_layer_end_index": -1, "moe_layer_interval": 1},
           experts=Experts(
               {"mlp.gate.weight": "moe_num_experts hidden_size",
                "mlp.moe_statics.e_score_correction_bias": "1 moe_num_experts",
                **_mlp("mlp.experts.*", "moe_intermediate_size"),
                **_mlp("mlp.shared_experts", "moe_intermediate_size*moe_num_shared_experts",
                       "use_bias")},
               "moe_num_experts", "moe_k",
               first="moe_layer_start_index", last="moe_layer_end_index",
               every="moe_layer_interval", **_WIDTH)),
    Family("qwen3_5_text", "Qwen3_5ForCausalLM", frozenset(_QWEN_NEXT_FEATURES), **_QWEN_NEXT,
           defaults=_QWEN_NEXT_SIZES, mixers=_delta_nets("qkv", "z", "b", "a"),
           config_class="Qwen3_5TextConfig", decoder_class="Qwen3_5TextModel"),
    Family("qwen3_next", "Qwen3NextForCausalLM",
           _features(Feature.EXPERTS, *_QWEN_NEXT_FEATURES), **_QWEN_NEXT,
           mixers=_delta_nets("qkvz", "ba"), defaults={
               **_QWEN_NEXT_SIZES, "num_experts": 512, "num_experts_per_tok": 10,
               "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
               "decoder_sparse_step": 1},
           experts=Experts(_WITH_SHARED, *_COUNTS, **_STEPS)),
    Family("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM",
           _features(Feature.EXPERTS, *_QWEN_NEXT_FEATURES), **_QWEN_NEXT, **_NO_MLP,
           mixers=_delta_nets("qkv", "z", "b", "a"), defaults={
               **_QWEN_NEXT_SIZES, "num_experts": 256, "num_experts_per_tok": 8,
               "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
           keys={"intermediate_size": "moe_intermediate_size"},
           experts=Experts(_WITH_SHARED, *_COUNTS, **_WIDTH),
           config_class="Qwen3_5MoeTextConfig", decoder_class="Qwen3_5MoeTextModel"),
    Family("deepseek_v3", "DeepseekV3ForCausalLM",
           _features(Feature.EXPERTS, Feature.MIXERS, Feature.LATENT, Feature.ROTARY), **_MLA,
           end_token=1, defaults={
               **_MLA_SIZES, "n_routed_experts": 256, "n_shared_experts": 1,
               "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
               "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4}, single_in_4=True,
           experts=Experts(_SCORED, *_ROUTED, **_FIRST)),
    Family("deepseek_v2", "DeepseekV2ForCausalLM",
           _features(Feature.EXPERTS, Feature.MIXERS, Feature.LATENT, Feature.ROTARY), **_MLA,
           end_token=2, refused=("mlp_bias",), defaults={
               **_MLA_SIZES, "n_routed_experts": 64, "n_shared_experts": 2,
               "moe_intermediate_size": 1407, "first_k_dense_replace": 0},
           experts=Experts(
               {name: size for name, size in _SCORED.items() if "correction" not in name},
               *_ROUTED, **_FIRST)),
    Family("minimax", "MiniMaxForCausalLM",
           _features(Feature.EXPERTS, Feature.MIXERS, Feature.MULTIPLIERS), **_NO_MLP,
           derive=_minimax, sliding="all", rope_theta=1000000.0, end_token=2, mixers=Mixers(
               "layers of lightning attention", {
                   "self_attn.norm.weight": _LIGHTNING,
                   "self_attn.qkv_proj.weight": f"3*{_LIGHTNING} hidden_size",
                   "self_attn.out_proj.weight": f"hidden_size {_LIGHTNING}",
                   "self_attn.output_gate.weight": f"{_LIGHTNING} hidden_size",
                   "self_attn.slope_rate": "num_attention_heads 1 1",
                   "self_attn.query_decay": "num_attention_heads block_size 1",
                   "self_attn.key_decay": "num_attention_heads block_size 1",
                   "self_attn.diagonal_decay": "1 num_attention_heads block_size block_size"},
               kinds=("linear_attention",), heads=("full_attention",), of_heads=True),
           defaults={"num_local_experts": 8, "num_experts_per_tok": 2, "block_size": 256},
           experts=Experts(_BLOCK_SPARSE, *_LOCAL, **_BLOCK)),
    Family("lfm2", "Lfm2ForCausalLM", _features(Feature.MIXERS), derive=_lfm2, qk_norm=True,
           query_norm="self_attn.q_layernorm", key_norm="self_attn.k_layernorm",
           output="self_attn.out_proj", gate="feed_forward.w1", up="feed_forward.w3",
           down="feed_forward.w2", attention_norm="operator_norm", mlp_norm="ffn_norm",
           final_norm="model.embedding_norm", rope_theta=1000000.0, end_token=2,
           keys={"tie_word_embeddings": "tie_embedding", "intermediate_size": "block_ff_dim"},
           settled={"block_auto_adjust_ff_dim": False, "block_ff_dim": None},
           defaults={**_TIED, "conv_L_cache": 3, "block_auto_adjust_ff_dim": True,
                     "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0},
           mixers=Mixers("short convolutions", {
               "conv.conv.weight": "hidden_size 1 conv_L_cache",
               "conv.conv.bias?conv_bias": "hidden_size",
               "conv.in_proj.weight": "3*hidden_size hidden_size",
               "conv.in_proj.bias?conv_bias": "3*hidden_size",
               "conv.out_proj.weight": "hidden_size hidden_size",
               "conv.out_proj.bias?conv_bias": "hidden_size"},
               kinds=("conv",), heads=("full_attention",))),
    Family("falcon_h1", "FalconH1ForCausalLM", _features(Feature.MIXERS, Feature.MULTIPLIERS),
           **_BIASES, mlp_bias="mlp_bias", derive=_falcon_h1, rope_theta=None,
           gate="feed_forward.gate_proj", up="feed_forward.up_proj",
           down="feed_forward.down_proj", mlp_norm="pre_ff_layernorm",
           final_norm="model.final_layernorm", end_token=2, defaults={
               "mamba_d_ssm": 1024, "mamba_n_heads": 128, "mamba_n_groups": 1,
               "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2,
               "mamba_conv_bias": True},
           mixers=Mixers("Mamba-2 mixers beside attention", _mamba2(
               "mamba", "ssm_width", "mamba_n_groups", "mamba_d_state", "mamba_n_heads",
               "mamba_d_conv", conv="mamba_conv_bias", enter="mamba_proj_bias",
               leave="projectors_bias", norm="mamba_rms_norm"))),
    Family("nemotron_h", "NemotronHForCausalLM",
           _features(Feature.MIXERS, Feature.ALTERNATING, Feature.NO_GATE, Feature.ACTIVATION,
                     Feature.ROTARY),
           mlp_bias="mlp_bias", derive=_nemotron_h, rope_theta=None, attention="mixer",
           query="mixer.q_proj", key="mixer.k_proj", value="mixer.v_proj", output="mixer.o_proj",
           gate="", up="mixer.up_proj", down="mixer.down_proj", attention_norm="norm",
           mlp_norm="", embedding="model.embeddings", final_norm="model.norm_f", end_token=2,
           stored=(("model.", "backbone."),), defaults={
               "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8,
               "ssm_state_size": 128, "conv_kernel": 4, "use_conv_bias": True},
           mixers=Mixers("Mamba-2 mixers", _mamba2(
               "mixer", "mamba_width", "n_groups", "ssm_state_size", "mamba_num_heads",
               "conv_kernel", conv="use_conv_bias", enter="use_bias", leave="use_bias"),
               kinds=("linear_attention",), heads=("full_attention",), channels=("mlp",))),
    Family("opt", "OPTForCausalLM", _features(Feature.NO_GATE, _LAYER_NORM, _POSITIONS),
           keys={"intermediate_size": "ffn_dim", **_EVERY_HEAD}, derive=_opt,
           derived_head_dim="attention",
           defaults={"enable_bias": True, "layer_norm_elementwise_affine": True,
                     "do_layer_norm_before": True, "max_position_embeddings": 2048, **_TIED},
           qkv_bias="enable_bias", output_bias="enable_bias", mlp_bias="enable_bias",
           norm_weight="layer_norm_elementwise_affine", norm_bias=True, rope_theta=None,
           layers="model.decoder.layers", output="self_attn.out_proj", gate="", up="fc1",
           down="fc2", attention_norm="self_attn_layer_norm", mlp_norm="final_layer_norm",
           embedding="model.decoder.embed_tokens", positions="model.decoder.embed_positions",
           more_positions=2, final_norm="model.decoder.final_layer_norm",
           embedding_projections=("model.decoder.project_in", "model.decoder.project_out"),
           variants=(
               ("_remove_final_layer_norm", {"final_norm": ""}),
               ("!do_layer_norm_before", {
                   "features": _features(Feature.POST_NORM),
                   "attention_norm": "", "mlp_norm": "", "final_norm": "",
                   "more_norms": ("self_attn_layer_norm", "final_layer_norm")})),
           end_token=2),
    Family("gpt_neox", "GPTNeoXForCausalLM",
           _features(Feature.PARALLEL, Feature.NO_GATE, _LAYER_NORM, Feature.ROTARY,
                     Feature.FUSED, Feature.SIDE_BY_SIDE), **_BIASES, **_4H,
           **_fused("attention.query_key_value"), side_by_side=True, output="attention.dense",
           mlp_bias=True, norm_bias=True, attention="attention", layers="gpt_neox.layers",
           embedding="gpt_neox.embed_in", head="embed_out",
           final_norm="gpt_neox.final_layer_norm", rope_theta=None, derived_head_dim="attention",
           keys={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct",
                 **_EVERY_HEAD},
           defaults={"attention_bias": True, "use_parallel_residual": True},
           obsolete=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
           variants=(("!use_parallel_residual", {"features": _features(Feature.PARALLEL)}),),
           end_token=2),
    Family("gptj", "GPTJForCausalLM",
           _features(Feature.PARALLEL, Feature.NO_GATE, _LAYER_NORM, Feature.ROTARY),
           **_TRANSFORMER, keys={**_N_KEYS, **_EVERY_HEAD}, derive=four_times,
           query="attn.q_proj", key="attn.k_proj", value="attn.v_proj", output="attn.out_proj",
           gate="", up="mlp.fc_in", down="mlp.fc_out", mlp_bias=True, attention="attn",
           attention_norm="ln_1", mlp_norm="", embedding="transformer.wte", head_bias=True,
           obsolete=("attn.bias", "attn.masked_bias"), end_token=50256),
    Family("gpt2", "GPT2LMHeadModel",
           _features(Feature.NO_GATE, _LAYER_NORM, _POSITIONS, Feature.FUSED, Feature.TRANSPOSED),
           **_TRANSFORMER, **_GPT2, keys={**_N_KEYS, **_EVERY_HEAD}, transposed=True,
           config_class="GPT2Config", decoder_class="GPT2Model"),
    Family("falcon", "FalconForCausalLM",
           _features(Feature.PARALLEL, Feature.NO_GATE, _LAYER_NORM, Feature.ROTARY,
                     Feature.FUSED, Feature.SIDE_BY_SIDE), **_4H, **_TRANSFORMER,
           **_fused("self_attention.query_key_value"), side_by_side=True, uneven_groups=False,
           output="self_attention.dense", attention="self_attention", mlp_norm="",
           embedding="transformer.word_embeddings", qkv_bias="bias", output_bias="bias",
           mlp_bias="bias", derive=_falcon,
           keys={"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"},
           defaults={"multi_query": True, "parallel_attn": True, **_TIED},
           variants=(
               ("!parallel_attn", {"mlp_norm": "post_attention_layernorm",
                                   "features": _features(Feature.PARALLEL)}),
               ("two_norms", {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"}),
               ("new_decoder_architecture", {"caches_queries": True}),
               ("alibi", {"features": _features(Feature.ALIBI, Feature.ROTARY),
                          "per_head": ("alibi", "attention_mask")})),
           obsolete=("self_attention.rotary_emb.inv_freq",), end_token=11),
    Family("bloom", "BloomForCausalLM",
           _features(Feature.NO_GATE, _LAYER_NORM, Feature.ALIBI, Feature.FUSED,
                     Feature.SIDE_BY_SIDE), **_4H, **_TRANSFORMER,
           **_fused("self_attention.query_key_value"), side_by_side=True,
           output="self_attention.dense", attention="self_attention", qkv_bias=True,
           output_bias=True, mlp_bias=True, embedding="transformer.word_embeddings",
           embedding_norm="transformer.word_embeddings_layernorm", per_head=("alibi",),
           keys={"num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
                 "hidden_size": "n_embed", "intermediate_size": "", **_EVERY_HEAD},
           derive=four_times, defaults=_TIED, end_token=2,
           # With the second its projections are not called as modules, and have no biases.
           refused=("apply_residual_connection_post_layernorm", "slow_but_exact")),
    Family("mpt", "MptForCausalLM",
           _features(Feature.NO_GATE, _LAYER_NORM, Feature.ALIBI, Feature.FUSED),
           **{**_TRANSFORMER, "layers": "transformer.blocks",
              "final_norm": "transformer.norm_f", "norm_bias": False},
           **_fused("attn.Wqkv"), output="attn.out_proj", attention="attn", gate="",
           up="ffn.up_proj", down="ffn.down_proj", attention_norm="norm_1", mlp_norm="norm_2",
           embedding="transformer.wte", per_head=("position_bias",),
           keys={"num_attention_heads": "n_heads", "num_hidden_layers": "n_layers",
                 "hidden_size": "d_model", "intermediate_size": "", **_EVERY_HEAD},
           derive=_mpt, defaults={"expansion_ratio": 4, **_TIED}, single_in_4=True),
    Family("gpt_neo", "GPTNeoForCausalLM",
           _features(Feature.NO_GATE, _LAYER_NORM, _POSITIONS, Feature.MULTIPLIERS),
           **_TRANSFORMER,
           **{**_GPT2, "qkv_bias": False, "query": "attn.attention.q_proj",
              "key": "attn.attention.k_proj", "value": "attn.attention.v_proj",
              "output": "attn.attention.out_proj", "defaults":
                  {"max_position_embeddings": 2048, **_TIED},
              "obsolete": ("attn.attention.bias", "attn.attention.masked_bias")},
           keys={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers",
                 **_EVERY_HEAD}),
    Family("gpt_bigcode", "GPTBigCodeForCausalLM",
           _features(Feature.NO_GATE, _LAYER_NORM, _POSITIONS, Feature.FUSED,
                     Feature.SIDE_BY_SIDE),
           **_TRANSFORMER,
           **{**_GPT2, "derive": _bigcode,
              "defaults": {"n_positions": 1024, "multi_query": True, **_TIED}},
           keys=_N_KEYS, side_by_side=True),
    Family("persimmon", "PersimmonForCausalLM",
           _features(Feature.NO_GATE, _LAYER_NORM, Feature.ROTARY, Feature.FUSED,
                     Feature.SIDE_BY_SIDE), **_4H,
           **_fused("self_attn.query_key_value"), side_by_side=True, output="self_attn.dense",
           qkv_bias=True, output_bias=True, mlp_bias=True, norm_bias=True,
           qk_norm="qk_layernorm", qk_norm_bias=True, query_norm="self_attn.q_layernorm",
           key_norm="self_attn.k_layernorm", final_norm="model.final_layernorm",
           rope_theta=None, derived_head_dim="attention", keys=_EVERY_HEAD,
           defaults={"qk_layernorm": True}, end_token=2),
)

# Decoders that only models with a tower of vision have.
TEXTS = (
    Family("qwen2_5_vl_text", "Qwen2_5_VLForConditionalGeneration", _features(Feature.ROTARY),
           qkv_bias=True, rope_theta=None, derived_head_dim="attention", sliding="listed"),
    Family("qwen3_vl_text", "Qwen3VLForConditionalGeneration", _features(Feature.ROTARY), **_BIASES,
           qk_norm=True, rope_theta=None, defaults={"head_dim": 128}),
)
_LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
          "num_attention_heads": 32, "vocab_size": 32000}
WRAPPERS = (
    Wrapper("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text"),
    Wrapper("qwen3_vl", "Qwen3VLForConditionalGeneration", "qwen3_vl_text"),
    Wrapper("qwen3_5", "Qwen3_5ForConditionalGeneration", "qwen3_5_text"),
    Wrapper("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text"),
    Wrapper("llava", "LlavaForConditionalGeneration", "llama", defaults=_LLAMA),
    Wrapper("mistral3", "Mistral3ForConditionalGeneration", "mistral"),
    Wrapper("gemma3", "Gemma3ForConditionalGeneration", "gemma3_text", defaults={
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208}),
    Wrapper("gemma4", "Gemma4ForConditionalGeneration", "gemma4_text"),
    Wrapper("smolvlm", "SmolVLMForConditionalGeneration", "llama", "model.text_model"),
    Wrapper("internvl", "InternVLForConditionalGeneration", "qwen2"),
)
# fmt: on
