"""Tiny real checkpoints on disk, and the slow definitions that fast code is compared with.

Nothing here uses the package's slicing, masking or writing, so that it can judge them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from old_transformers import in_its_words
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from spp_export.common.progress import quiet_transformers
from spp_export.evaluation.contract import ragged_layers as ragged_layers
from spp_export.evaluation.contract import random_layers as random_layers
from spp_export.evaluation.contract import uniform_layers as uniform_layers
from spp_export.models.families import FAMILIES, Role
from spp_export.models.shape import ModelShape
from spp_export.planning import LayerPlan, Layout
from spp_export.slicing.config import MODELING_FILES, slim_config

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<|endoftext|>"
# One token per byte and four special ones make 260. A prime number, hence no layer's width: readers
# that recognise the language model head by its size would otherwise take a layer for it.
VOCAB = 263


def make_checkpoint(
    tmp_path: Path,
    family: str,
    *,
    kv_heads: int,
    query_heads: int,
    layers: int = 3,
    head_dim: int = 16,
    hidden: int = 64,
    channels: int = 96,
    vocab: int = VOCAB,
    tied: bool = False,
    attention_bias: bool = False,
    dtype: str = "float32",
    shards: int = 1,
    seed: int = 0,
    name: str = "dense",
    **config: Any,
) -> Path:
    """Write a random model of a family with a tokenizer to `tmp_path / name` and return that path.

    `config` adds any further keys of config.json. `shards` is approximate above 1.
    """
    assert vocab not in {hidden, channels, head_dim * query_heads, head_dim * kv_heads}
    if attention_bias:
        config["attention_bias"] = True
    settings = AutoConfig.for_model(
        family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=channels,
        num_hidden_layers=layers,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{"max_position_embeddings": 1024, **in_its_words(config)},
    )
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    _randomise(model, seed)
    model.to(getattr(torch, dtype))
    target = tmp_path / name
    size = sum(parameter.nbytes for parameter in model.parameters())
    with quiet_transformers():
        model.save_pretrained(target, max_shard_size=math.ceil(size / shards) + (shards == 1))
    write_tokenizer(target)
    return target


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights that keep activations near one, and norms and biases that cannot be skipped."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith(".bias") or "embed_tokens" in name:
                parameter.copy_(0.3 * noise)
            else:
                # sharper attention than a trained initialisation has, so that masks matter
                gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.copy_(gain * noise / math.sqrt(parameter.shape[-1]))


def write_tokenizer(target: Path) -> None:
    """A byte-level tokenizer without merges: any text, one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([PAD, BOS, EOS, *alphabet, UNKNOWN])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, BOS, EOS, UNKNOWN])
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        # transformers 4.57 would also give token_type_ids, which no decoder takes
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1024,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


@dataclass(frozen=True)
class Case:
    """A named checkpoint to try things on: arguments of `make_checkpoint`."""

    name: str
    family: str
    options: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        return self.name

    def make(self, tmp_path: Path, **changes: Any) -> Path:
        """Write the case's checkpoint below `tmp_path`."""
        return make_checkpoint(tmp_path, self.family, **{**self.options, **changes})


def _case(name: str, **options: Any) -> Case:
    return Case(name, name.split("-")[0], options)


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
_OTHER_THETA = {"rope_type": "default", "rope_theta": 500.0}

# Every family; MHA, GQA and MQA; tied and not; biases; q wider than the hidden size; rotary
# settings that a reader of the wrong form of config.json would miss; sliding windows; shards.
CASES: tuple[Case, ...] = (
    _case("llama-mha-tied", kv_heads=4, query_heads=4, tied=True),
    _case(
        "llama-gqa-bias",
        kv_heads=4,
        query_heads=8,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=_LLAMA3_ROPE,
        shards=3,
    ),
    _case("llama-mqa", kv_heads=1, query_heads=4, rope_parameters=_OTHER_THETA),
    _case("mistral-gqa", kv_heads=2, query_heads=6, sliding_window=None, shards=2),
    _case(
        "mistral-window-tied",
        kv_heads=4,
        query_heads=8,
        tied=True,
        sliding_window=6,
        rope_parameters=_OTHER_THETA,
    ),
    _case("qwen2-gqa-tied", kv_heads=2, query_heads=6, tied=True, rope_parameters=_YARN_ROPE),
    _case(
        "qwen2-mha-window",
        kv_heads=4,
        query_heads=4,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        shards=2,
    ),
    _case("qwen3-gqa-tied", kv_heads=4, query_heads=8, tied=True, rope_parameters=_OTHER_THETA),
    _case(
        "qwen3-mqa-bias",
        kv_heads=1,
        query_heads=4,
        attention_bias=True,
        rope_parameters=_LINEAR_ROPE,
        shards=4,
    ),
)


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def format_options(options: Any) -> dict[str, Any]:
    """The options of a format as arguments of `export` and `convert`."""
    if options is None:
        return {}
    given = {"precision": options.precision, "quant": options.quant}
    if hasattr(options, "attention"):
        return {"format": "onnx", "onnx_attention": options.attention, **given}
    return {"format": "gguf", **given}


def shape_of(directory: Path) -> ModelShape:
    """Sizes of a dense checkpoint."""
    config = read_config(directory)
    return FAMILIES[config["model_type"]].read_shape(config, element_bytes=4)


def _elements(heads: Sequence[int], head_dim: int) -> torch.Tensor:
    return torch.tensor([head * head_dim + i for head in heads for i in range(head_dim)])


def slice_in_torch(model: PreTrainedModel, layers: Sequence[LayerPlan]) -> dict[str, torch.Tensor]:
    """Tensors of the slim model, by the definition: rows of q, k, v, gate and up, columns of o and
    down, of the units each layer keeps. `layers` is one entry per layer of the dense `model`."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    head_dim = model.config.head_dim
    for index, layer in enumerate(layers):
        query = _elements(layer.query_heads, head_dim)
        kv = _elements(layer.kv_heads, head_dim)
        cuts = [("self_attn.q_proj", 0, query), ("self_attn.o_proj", 1, query)]
        cuts += [("self_attn.k_proj", 0, kv), ("self_attn.v_proj", 0, kv)]
        if layer.channels is not None:
            kept = torch.tensor(layer.channels)
            cuts += [("mlp.gate_proj", 0, kept), ("mlp.up_proj", 0, kept)]
            cuts += [("mlp.down_proj", 1, kept)]
        for module, axis, indices in cuts:
            weight, bias = (f"model.layers.{index}.{module}.{kind}" for kind in ("weight", "bias"))
            state[weight] = state[weight].index_select(axis, indices).contiguous()
            if axis == 0 and bias in state:
                state[bias] = state[bias].index_select(0, indices).contiguous()
    return state


@contextmanager
def mask_in_torch(model: PreTrainedModel, layers: Sequence[LayerPlan]) -> Iterator[PreTrainedModel]:
    """The dense `model` with the removed units' inputs of o_proj and down_proj set to zero."""
    handles = []
    for module, layer in zip(model.model.layers, layers, strict=True):
        query = _elements(layer.query_heads, model.config.head_dim)
        handles.append(_zero_inputs(module.self_attn.o_proj, query))
        if layer.channels is not None:
            handles.append(_zero_inputs(module.mlp.down_proj, torch.tensor(layer.channels)))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _zero_inputs(module: torch.nn.Linear, kept: torch.Tensor) -> Any:
    mask = torch.zeros(module.in_features)
    mask[kept] = 1

    def zero(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0] * mask.to(inputs[0].dtype),)

    return module.register_forward_pre_hook(zero)


def write_slim(
    target: Path,
    dense: Path,
    layers: Sequence[LayerPlan],
    layout: Layout = "per-layer",
    biases: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """A slim checkpoint of the `dense` directory, written the slow way, with its tokenizer.

    `biases` are those of every layer's o_proj, down_proj or both, by full name."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    config, shape = read_config(dense), shape_of(dense)
    shapes = [layer.shape(shape) for layer in layers]
    family = FAMILIES[shape.model_type]
    target.mkdir(parents=True)
    ends = {Role.OUTPUT: "o_proj.bias", Role.DOWN: "down_proj.bias"}
    biased = {
        role for role, end in ends.items() if any(name.endswith(end) for name in biases or ())
    }
    slim = slim_config(config, family, shape, shapes, layout, biased)
    (target / "config.json").write_text(json.dumps(slim, indent=2))
    metadata = {"format": "pt"}
    tensors = {**slice_in_torch(model, layers), **(biases or {})}
    save_file(tensors, target / "model.safetensors", metadata)
    copied = [dense / name for name in ("tokenizer.json", "tokenizer_config.json")]
    copied.append(dense / "generation_config.json")
    for source in [*copied, *(MODELING_FILES if layout != "uniform" else ())]:
        shutil.copy(source, target)
    return target
