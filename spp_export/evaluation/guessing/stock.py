"""Tiny models of an architecture of transformers, with everything else as a config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
)

from spp_export.common.errors import ModelError

# Of every count another number, and no sum of some of them another's, so that shapes tell what they
# count. Heads that fill the hidden size have 16 elements.
LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH, VOCABULARY, POSITIONS = (
    2,
    4,
    2,
    24,
    64,
    40,
    97,
    50,
)
_SIZES = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
}
_OPTIONAL = ("num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings")
# What configs call them where transformers itself has no map to Llama's names.
_NAMES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_kv_heads", "n_head_kv"),
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "intermediate_size": ("ffn_dim", "n_inner", "ffn_hidden_size", "d_ff"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
}
_WINDOW, _ROTARY_DIM = 5, 8
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Lists that have a number for every pair of a head's elements, or for parts of them.
_ROTARY_LISTS = {"short_factor", "long_factor", "mrope_section"}
# Of a config.json, what says nothing of the architecture.
_BESIDE = {
    *("model_type", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype"),
    *("quantization_config", "_name_or_path", "attn_implementation", "_attn_implementation"),
}


@dataclass(frozen=True)
class Stock:
    """An architecture with a config.json's settings.

    keys      its config's names of Llama's sizes, as far as it has them
    settings  of the config, with tiny sizes
    real      the same with the sizes as they are, of as many layers as the tiny ones
    """

    kind: Any
    keys: Mapping[str, str]
    settings: Mapping[str, Any]
    real: Mapping[str, Any]

    @property
    def width(self) -> int:
        """Channels of a tiny model: four times the hidden size where the config has no key."""
        return WIDTH if "intermediate_size" in self.keys else 4 * HIDDEN

    @property
    def switches(self) -> dict[str, bool]:
        """The booleans of the config that are its own."""
        usual = PretrainedConfig().to_dict().keys() | {"use_cache", "tie_word_embeddings"}
        return {
            key: value
            for key, value in self.settings.items()
            if isinstance(value, bool) and key not in usual
        }

    @property
    def takes_head_dim(self) -> bool:
        """Whether its config keeps a size of heads that is given."""
        return getattr(self.config(), "head_dim", None) == HEAD_DIM

    def filling(self) -> Stock:
        """With heads that fill the hidden size; where config.json does not say so, it must not."""
        settings = {key: value for key, value in self.settings.items() if key != "head_dim"}
        more = {"head_dim": HIDDEN // HEADS} if "head_dim" in self.keys else {}
        return replace(self, settings=settings | more)

    def ungrouped(self) -> Stock:
        """With a KV head for every query head."""
        key = self.keys.get("num_key_value_heads")
        return replace(self, settings=dict(self.settings) | ({key: HEADS} if key else {}))

    def config(self, **changes: Any) -> Any:
        """Of a tiny model."""
        return self.kind(**{**self.settings, **changes})

    def model(self, **changes: Any) -> Any:
        """A tiny model without memory."""
        return empty_model(self.config(**changes))


def read_stock(config: Mapping[str, Any]) -> Stock:
    """Of a parsed config.json. Raises ModelError where transformers has no such causal language
    model, or its config no such sizes."""
    name = config.get("model_type")
    kind: Any = CONFIG_MAPPING[name] if isinstance(name, str) and name in CONFIG_MAPPING else None
    if kind is None or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            "this version of transformers has no causal language model of that type, and code "
            "that comes with a checkpoint is not run. Install a version that has it."
        )
    kept = {key: value for key, value in config.items() if key not in _BESIDE}
    native = {k: v for k, v in kind(**kept).to_dict().items() if k not in _BESIDE}
    keys = {}
    for key in _SIZES:
        names = (kind.attribute_map.get(key, key), *_NAMES.get(key, ()))
        found = next((name for name in names if name in native), "")
        if found:
            keys[key] = found
        elif key not in _OPTIONAL:
            raise ModelError(f"its config has no {key}, nor another name of it that is known.")
    tiny = {keys.get(key, key): size for key, size in _SIZES.items()}
    if "intermediate_size" not in keys:
        del tiny["intermediate_size"]
    if isinstance(getattr(kind, "head_dim", None), property):
        del tiny["head_dim"]
    return Stock(
        kind,
        keys,
        _small(native, keys) | tiny | _SPECIAL,
        _fewer_layers(native, keys),
    )


def empty_model(config: Any) -> Any:
    """The model of a config, without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _fewer_layers(native: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """Two layers, of different kinds where there are some."""
    count = native[keys["num_hidden_layers"]]
    lists = [x for x in native.values() if isinstance(x, list) and len(x) == count > 1]
    other = next((i for i in range(1, count) if any(x[i] != x[0] for x in lists)), 1)
    return {
        key: [value[0], value[other]] if any(value is x for x in lists) else value
        for key, value in native.items()
    } | {keys["num_hidden_layers"]: LAYERS}


def _small(native: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """What is as large as the model, or counts its tokens, for a tiny one."""
    hidden = native[keys["hidden_size"]]
    small = _fewer_layers(native, keys)
    for key, value in small.items():
        if key.endswith("_token_id") and isinstance(value, (int, list)):
            small[key] = _SPECIAL.get(key, 3)
        elif type(value) is int and key in ("sliding_window", "window_size"):
            small[key] = _WINDOW
        elif type(value) is int and key == "rotary_dim":
            small[key] = _ROTARY_DIM
        elif type(value) is int and value == hidden:
            small[key] = HIDDEN
        elif isinstance(value, dict):
            small[key] = _plain_rotation(value)
    return small


def _plain_rotation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings without what has a number for each element of a head."""
    if not settings.keys() & _ROTARY_LISTS:
        nested = {k: v for k, v in settings.items() if isinstance(v, dict)}
        return {**settings, **{key: _plain_rotation(value) for key, value in nested.items()}}
    kept = {k: v for k, v in settings.items() if k in ("rope_theta", "partial_rotary_factor")}
    return {**kept, "rope_type": "default"}
