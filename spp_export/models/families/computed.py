"""What decoders compute with their tensors, for engines that do not run the stock classes.

A record of `table.py` says which tensors there are and, by its features, that something is done
otherwise than in Llama; here stands what, as far as tensors and features do not tell. A family with
features and no entry here is one that only transformers computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log2, sqrt
from typing import Any, Literal

# A number or a word: a key of the stock config that has it, or what makes it of one.
Of = str | Callable[[Any], Any]


@dataclass(frozen=True)
class Routing:
    """How a router's outputs choose experts and weigh what they write.

    scores      what the outputs become: a softmax over all experts, or each its sigmoid; those of
                the highest scores are chosen, or of the highest sums where a tensor adds to them
    normalised  whether the scores of those chosen are divided by their sum; a key says whether
    floor       of that sum; none where it is ""
    factor      of the weights then; 1 where it is ""
    swiglu      in place of the activation and its product with what is up: alpha, beta and limit
                of g sigmoid(alpha g) (u + beta), with g at most the limit and u within it
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalised: Of | bool = True
    floor: Of = ""
    factor: Of = ""
    swiglu: Callable[[Any], tuple[float, float, float]] | None = None


@dataclass(frozen=True)
class Computed:
    """The computation of a family, where it is not Llama's.

    epsilon     of every norm
    activation  of the MLP, by transformers' name for it
    context     positions that the model was made for
    embedding, writes, logits  factors of what comes out of the embedding, of what attention and MLP
                add to the stream, and of the logits; 1 where they are ""
    scores      factor of the products of queries and keys; "" is head_dim ** -0.5
    score_cap, logit_cap  what scores and logits approach, c in c * tanh(x / c); none where they
                are "" or None
    clip        the largest magnitude of queries, keys and values; none where it is "" or None
    normed_embedding  a norm without weights follows the embedding
    normed_heads  norms without weights for queries and keys
    interleaved  the rotary embedding turns neighbours, not halves
    backwards   it turns the other way round
    rotates     whether it does in a layer; None is in all
    turns_part  only the beginning of a head turns, in models as they are published
    rotary      theta and how many elements of a head turn, where no class of the family says so
    query_factor  of the queries at a position, of the config and the positions
    windows     per layer, where the config has another way to say it than `Family.sliding`
    slopes      of a bias of scores by distance, for each query head of the dense model
    routing     of experts; None where none is told
    llama_cpp   the architecture of llama.cpp's that computes it, where all layers are alike
    unknown     keys of the stock config that change the computation if they are true, and that no
                engine but transformers is told of
    """

    epsilon: str | float = "rms_norm_eps"
    activation: Of = "hidden_act"
    context: Of = "max_position_embeddings"
    embedding: Of = ""
    writes: Of = ""
    logits: Of = ""
    scores: Of = ""
    score_cap: Of = ""
    logit_cap: Of = ""
    clip: Of = ""
    normed_embedding: bool = False
    normed_heads: bool = False
    interleaved: bool = False
    backwards: bool = False
    rotates: Callable[[Any, int], bool] | None = None
    turns_part: bool = False
    rotary: Callable[[Any], tuple[float, int]] | None = None
    query_factor: Callable[[Any, Any], Any] | None = None
    windows: Callable[[Any], Sequence[int | None]] | None = None
    slopes: Callable[[Any], Sequence[float]] | None = None
    routing: Routing | None = None
    llama_cpp: str = ""
    unknown: tuple[str, ...] = ()


def read(config: Any, setting: Of, default: Any = None) -> Any:
    """What a stock config says of a setting."""
    if callable(setting):
        return setting(config)
    return getattr(config, setting, default) if setting else default


def _root(config: Any) -> float:
    return sqrt(config.hidden_size)


def _query_scalar(config: Any) -> float:
    return 1 / sqrt(config.query_pre_attn_scalar)


def _slides(config: Any, layer: int) -> bool:
    return bool(config.layer_types[layer] == "sliding_attention")


def _powers(heads: int) -> list[float]:
    """Slopes of ALiBi: Press et al., Train Short, Test Long (2022), section 3, and its code for
    numbers of heads that are no powers of two."""
    nearest = 1 << int(log2(heads))
    slopes = [2.0 ** (-8 * (head + 1) / nearest) for head in range(nearest)]
    between = [2.0 ** (-8 * (head + 0.5) / nearest) for head in range(nearest)]
    return slopes + between[: heads - nearest]


def _mpt_slopes(config: Any) -> list[float]:
    """The same, but that every second one of twice as many comes first."""
    heads, most = config.n_heads, config.attn_config.alibi_bias_max
    above = 1 << (heads - 1).bit_length()
    slopes = [2.0 ** (-most * (head + 1) / above) for head in range(above)]
    return slopes if above == heads else (slopes[1::2] + slopes[::2])[:heads]


def _by_length(config: Any, positions: Any) -> Any:
    """Llama 4's factor of queries."""
    import numpy as np

    settings = config.rope_parameters
    beta = settings.get("llama_4_scaling_beta") or 0.0
    original = settings.get("original_max_position_embeddings") or config.max_position_embeddings
    return 1 + beta * np.log(1 + np.floor(positions / original))


def _gpt_oss_swiglu(config: Any) -> tuple[float, float, float]:
    # Older versions of transformers have them in the code of the experts.
    alpha, limit = (getattr(config, f"swiglu_{name}", None) for name in ("alpha", "limit"))
    return 1.702 if alpha is None else alpha, 1.0, 7.0 if limit is None else limit


_LAYER_EPS = "layer_norm_eps"
_BY_CONFIG = Routing(normalised="norm_topk_prob")
_SCORED = Routing("sigmoid", "norm_topk_prob", factor="routed_scaling_factor")
_GPT: Mapping[str, Any] = {"epsilon": "layer_norm_epsilon", "activation": "activation_function"}
_UP: Mapping[str, Any] = {
    "embedding": "embedding_multiplier",
    "writes": "residual_multiplier",
    "scores": "attention_multiplier",
}

# fmt: off
COMPUTED: Mapping[str, Computed] = {
    "qwen2": Computed(llama_cpp="qwen2"),
    "qwen3": Computed(llama_cpp="qwen3"),
    "granite": Computed(**_UP, logits=lambda c: 1 / c.logits_scaling),
    "hyperclovax": Computed(**_UP, logits="logits_scaling"),
    "ernie4_5": Computed(interleaved=True),
    "smollm3": Computed(rotates=lambda c, layer: bool(c.no_rope_layers[layer])),
    "ministral3": Computed(query_factor=_by_length),
    "arcee": Computed(llama_cpp="arcee"),
    "nemotron": Computed(epsilon="norm_eps", llama_cpp="nemotron"),
    "starcoder2": Computed(epsilon="norm_epsilon", llama_cpp="starcoder2"),
    "exaone4": Computed(rotates=lambda c, layer: c.sliding_window is None or _slides(c, layer)),
    "cohere": Computed(_LAYER_EPS, logits="logit_scale", interleaved=True, llama_cpp="command-r"),
    "cohere2": Computed(_LAYER_EPS, logits="logit_scale", interleaved=True, rotates=_slides),
    "gemma": Computed(embedding=_root, llama_cpp="gemma"),
    "gemma2": Computed(
        activation="hidden_activation", embedding=_root, scores=_query_scalar,
        score_cap="attn_logit_softcapping", logit_cap="final_logit_softcapping",
        llama_cpp="gemma2"),
    "gemma3_text": Computed(
        activation="hidden_activation", embedding=_root, scores=_query_scalar,
        score_cap="attn_logit_softcapping", logit_cap="final_logit_softcapping",
        llama_cpp="gemma3"),
    "olmo": Computed(1e-5, clip="clip_qkv"),
    "olmo2": Computed(),
    "olmo3": Computed(),
    "bitnet": Computed(),
    "phi": Computed(_LAYER_EPS, llama_cpp="phi2"),
    "phi3": Computed(llama_cpp="phi3"),
    "glm": Computed(interleaved=True, turns_part=True),
    "glm4": Computed(interleaved=True, llama_cpp="glm4"),
    "stablelm": Computed(_LAYER_EPS, llama_cpp="stablelm"),
    "jais2": Computed(_LAYER_EPS),
    "apertus": Computed(),
    "nanochat": Computed(normed_embedding=True, normed_heads=True, backwards=True,
                         logit_cap="final_logit_softcapping"),
    "opt": Computed(1e-5, "activation_function"),
    "gpt_neox": Computed(_LAYER_EPS, llama_cpp="gptneox"),
    "gptj": Computed(**_GPT, interleaved=True, rotary=lambda c: (10000.0, c.rotary_dim)),
    "gpt2": Computed(**_GPT, scores=lambda c: None if c.scale_attn_weights else 1.0,
                     unknown=("scale_attn_by_inverse_layer_idx",), llama_cpp="gpt2"),
    "gpt_bigcode": Computed(**_GPT, scores=lambda c: None if c.scale_attn_weights else 1.0),
    "gpt_neo": Computed(**_GPT, scores=lambda c: 1.0, windows=lambda c: [
        c.window_size if kind == "local" else None for kind in c.attention_layers]),
    "falcon": Computed("layer_norm_epsilon", "activation", llama_cpp="falcon"),
    "bloom": Computed("layer_norm_epsilon", lambda c: "gelu_pytorch_tanh",
                      context=lambda c: getattr(c, "seq_length", None) or 2048,
                      slopes=lambda c: _powers(c.n_head), llama_cpp="bloom"),
    "mpt": Computed("layer_norm_epsilon", lambda c: "gelu", context="max_seq_len",
                    scores=lambda c: c.attn_config.softmax_scale,
                    clip=lambda c: c.attn_config.clip_qkv, slopes=_mpt_slopes),
    "persimmon": Computed(_LAYER_EPS),
    "mixtral": Computed(routing=Routing()),
    "qwen3_moe": Computed(routing=_BY_CONFIG),
    "qwen2_moe": Computed(routing=_BY_CONFIG),
    "glm4_moe": Computed(routing=_SCORED),
    "dots1": Computed(routing=_SCORED),
    "ernie4_5_moe": Computed(interleaved=True, routing=Routing(floor="moe_norm_min")),
    "minimax_m2": Computed(routing=Routing("sigmoid")),
    "gpt_oss": Computed(routing=Routing(swiglu=_gpt_oss_swiglu)),
    "olmoe": Computed(clip="clip_qkv", routing=_BY_CONFIG),
    "granitemoe": Computed(**_UP, logits=lambda c: 1 / c.logits_scaling, routing=Routing()),
}
# fmt: on
