"""The files beside model.onnx, as dictionaries from dictionaries: no torch, no files.

config.json is for transformers.js, optimum and our own runtime, genai_config.json for
onnxruntime-genai, and the tokenizer's settings for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spp_export.formats.onnx.options import GRAPH_VERSION, OnnxOptions
from spp_export.models.families import Family
from spp_export.models.shape import LayerShape, ModelShape
from spp_export.slicing.config import portable_config

# What a per-layer checkpoint says to readers of its own classes.
_PER_LAYER_KEYS = (
    "per_layer_config",
    "serialize_explicit_per_layer_config",
    "base_architecture",
    "biased_projections",
    "per_layer_modules",
    "per_head",
)
# Names that genai knows, and what it takes where the model does not say.
_SEARCH = {
    "do_sample": False,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


def onnx_config(
    checkpoint_config: Mapping[str, Any],
    family: Family,
    shape: ModelShape,
    layers: Sequence[LayerShape],
    layout: str,
    options: OnnxOptions,
    context_length: int,
) -> dict[str, Any]:
    """config.json of an ONNX directory: a stock one, with the layers' own counts as lists.

    `shape` has the counts of the dense model, `layers` those of the graph, one entry each,
    `context_length` is in tokens. Keys are sorted, so equal arguments give equal JSON. Raises
    ModelError for a config that contradicts itself.
    """
    config = portable_config(checkpoint_config, family.rope_theta, family.rope_by_type)
    for key in _PER_LAYER_KEYS:
        config.pop(key, None)
    counts = shape.layer if layout == "per-layer" else layers[0]
    sizes = {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "max_position_embeddings": context_length,
        "num_attention_heads": _scalar_heads(shape, layout),
        "num_key_value_heads": counts.kv_heads,
        "intermediate_size": counts.channels,
    }
    named = {family.keys.get(key, ""): size for key, size in sizes.items()}
    config |= sizes | {key: size for key, size in named.items() if key}
    config |= {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "dtype": options.torch_dtype,
        "torch_dtype": options.torch_dtype,
        **({} if family.derived_head_dim == "attention" else {"head_dim": shape.head_dim}),
        "tie_word_embeddings": shape.tied_embeddings,
        "num_attention_heads_per_layer": [layer.query_heads for layer in layers],
        "num_key_value_heads_per_layer": [layer.kv_heads for layer in layers],
        **_widths(shape, layers),
        # `dtype` names the file: without a suffix, whatever the precision inside.
        "transformers.js_config": {"dtype": "fp32", "use_external_data_format": True},
        "spp_onnx": {**options.to_dict(), "layout": layout, "version": GRAPH_VERSION},
    }
    return dict(sorted(config.items()))


def _widths(shape: ModelShape, layers: Sequence[LayerShape]) -> dict[str, list[int]]:
    """Of the MLPs, or how many experts there are and how wide each is; 0 where there are none."""
    of_mlps = {"intermediate_size_per_layer": [layer.channels for layer in layers]}
    if not any(shape.sparse):
        return of_mlps
    counts, widths = shape.experts_in(layers), iter(shape.expert_widths(layers))
    return {
        **(of_mlps if shape.has_mlps else {}),
        "num_experts_per_layer": list(counts),
        "expert_size_per_layer": [next(widths) if count else 0 for count in counts],
    }


def genai_config(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    layers: Sequence[LayerShape],
    head_dim: int,
    options: OnnxOptions,
    stop: Sequence[int],
    kind: str,
) -> dict[str, Any]:
    """genai_config.json for onnxruntime-genai 0.15 or newer, from `onnx_config`'s result.

    `stop` are the tokens that end an answer, the only ones that the runtime stops at; `kind` is
    what it calls the model.
    The scalar head counts are the largest of any layer; the runtime takes every layer's own KV
    heads from the shapes of the graph's inputs. A sliding window is not mentioned: the graph masks
    by itself, over a KV cache of full length, and the section would ask for a cache that slides.
    """
    context = config["max_position_embeddings"]
    model: dict[str, Any] = {
        "type": kind,
        "vocab_size": config["vocab_size"],
        "context_length": context,
        "decoder": _decoder(config, layers, head_dim, options),
        **_special_tokens(config, generation_config, stop),
    }
    search: dict[str, Any] = {
        name: default if generation_config.get(name) is None else generation_config[name]
        for name, default in _SEARCH.items()
    }
    search |= {
        "max_length": context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": options.attention != "standard",
    }
    return {"model": dict(sorted(model.items())), "search": dict(sorted(search.items()))}


def tokenizer_config(source: Mapping[str, Any], options: OnnxOptions) -> dict[str, Any]:
    """tokenizer_config.json that transformers 4 and 5 read alike.

    It pads on the right where the graph takes no other side, and names no code of its own.
    """
    config = {key: value for key, value in source.items() if key != "auto_map"}
    if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for it
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if config.get("tokenizer_class") == "PreTrainedTokenizerFast":
        # 4 would also give token_type_ids, which `generate` refuses for a decoder
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(config.get("extra_special_tokens"), list):  # 4 wants an object under this name
        known = config.get("additional_special_tokens") or []
        extra = config.pop("extra_special_tokens")
        config["additional_special_tokens"] = [*known, *(t for t in extra if t not in known)]
    if options.attention == "gqa":
        config["padding_side"] = "right"
    return config


def _scalar_heads(shape: ModelShape, layout: str) -> int:
    """The count that stands in num_attention_heads.

    optimum's class divides hidden_size by it to get the head size. A uniform slim checkpoint no
    longer says how many heads its source had, so there it is the number that divides right.
    """
    if layout == "per-layer" or shape.hidden_size % shape.head_dim:
        return shape.query_heads
    return shape.hidden_size // shape.head_dim


def _decoder(
    config: Mapping[str, Any],
    layers: Sequence[LayerShape],
    head_dim: int,
    options: OnnxOptions,
) -> dict[str, Any]:
    inputs = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    if options.attention != "gqa":
        inputs["position_ids"] = "position_ids"
    return {
        "filename": "model.onnx",
        "head_size": head_dim,
        "hidden_size": config["hidden_size"],
        "inputs": dict(sorted(inputs.items())),
        "num_attention_heads": max(layer.query_heads for layer in layers),
        "num_hidden_layers": len(layers),
        "num_key_value_heads": max(layer.kv_heads for layer in layers),
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
    }


def _special_tokens(
    config: Mapping[str, Any], generation_config: Mapping[str, Any], stop: Sequence[int]
) -> dict[str, Any]:
    """bos, eos and pad as far as they are known; generation's own settings come first."""
    tokens: dict[str, Any] = {}
    for name in ("bos_token_id", "pad_token_id"):
        value = generation_config.get(name)
        value = config.get(name) if value is None else value
        if value is not None:
            tokens[name] = value
    if stop:
        tokens["eos_token_id"] = list(stop) if len(stop) > 1 else stop[0]
        tokens.setdefault("pad_token_id", stop[0])
    return tokens
