"""Tiny dense checkpoints, written by the safetensors library, of every family we slice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from spp_export.models.families import family_of

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "llama-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
}
SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "intermediate_size": 40,
    "vocab_size": 64,
}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """A whole config.json of a tiny model; a change to None removes the key."""
    config = {**CONFIGS[family], **SIZES, **changes}
    return {key: value for key, value in config.items() if value is not None}


def random_tensors(
    config: Mapping[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random weights under the names that the family of `config` has."""
    family, generator = family_of(config), torch.Generator().manual_seed(seed)
    shape = family.read_shape(config, 4)
    return {
        spec.name: torch.randn(spec.shape, generator=generator).to(dtype)
        for spec in family.tensors(shape, shape.layers)
    }


def write_model(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    shards: int = 1,
) -> Path:
    """A model directory with one safetensors file, or `shards` of them and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
