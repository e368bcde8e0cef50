"""Everything a GGUF file of a checkpoint is to hold, before a byte of it is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spp_export.formats.gguf.architecture import (
    Architecture,
    architecture_of,
    file_layers,
    gguf_settings,
)
from spp_export.formats.gguf.options import FILE_TYPES, GgufOptions
from spp_export.formats.gguf.rotary import rotary_metadata
from spp_export.formats.gguf.tensors import GgufTensor, gguf_tensors
from spp_export.formats.gguf.tokenizer import tokenizer_metadata
from spp_export.formats.gguf.values import Metadata, Value, count, integers, real, text
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.families import Feature
from spp_export.models.shape import LayerShape


@dataclass(frozen=True)
class Contents:
    """Metadata and tensors, in the order of the file; `options` are resolved."""

    architecture: Architecture
    options: GgufOptions
    metadata: Metadata
    tensors: tuple[GgufTensor, ...]

    @property
    def vocab_size(self) -> int:
        """Tokens of the file."""
        tokens = self.metadata["tokenizer.ggml.tokens"].items
        assert isinstance(tokens, tuple)
        return len(tokens)

    @property
    def fallbacks(self) -> tuple[GgufTensor, ...]:
        """Tensors whose rows are no multiple of a block, and so not quantised as asked."""
        return tuple(tensor for tensor in self.tensors if tensor.requested)

    def summary(self) -> dict[str, Any]:
        """For verify.json and config.json."""
        counted = Counter(tensor.kind for tensor in self.tensors)
        return {
            "architecture": self.architecture.name,
            **self.options.to_dict(),
            "tensors": dict(sorted(counted.items())),
            "not_quantised": [tensor.name for tensor in self.fallbacks],
        }


def gguf_contents(decoder: Checkpoint, options: GgufOptions, name: str) -> Contents:
    """What the file of a decoder holds, with the tokenizer in the directory of its path.

    `name` is what users are shown. Raises ModelError for what llama.cpp cannot run.
    """
    options.check()
    resolved = options.resolved(decoder.dtype)
    architecture = architecture_of(decoder)
    metadata = model_metadata(decoder, architecture, resolved, name)
    metadata |= tokenizer_metadata(decoder.path, decoder.shape.vocab_size, decoder.config)
    return Contents(architecture, resolved, metadata, gguf_tensors(decoder, architecture, resolved))


# Of the layout of quantised blocks.
_QUANTISATION_VERSION = 2


def model_metadata(
    decoder: Checkpoint, architecture: Architecture, options: GgufOptions, name: str
) -> Metadata:
    """Every key but the tokenizer's; `options` are resolved, `name` is shown to users.

    Raises ModelError for rotary settings that llama.cpp has not.
    """
    shape, settings, arch = decoder.shape, gguf_settings(decoder), architecture.name
    layers = file_layers(decoder, architecture)

    def per_layer(size: Callable[[LayerShape], int]) -> Value:
        sizes = [size(layer) for layer in layers]
        return count(sizes[0]) if len(set(decoder.layers)) == 1 else integers(sizes)

    norm = "layer_norm_rms_epsilon"
    if Feature.LAYER_NORM in decoder.family.features:
        norm = "layer_norm_epsilon"
    return {
        "general.architecture": text(arch),
        "general.type": text("model"),
        "general.name": text(name),
        "general.file_type": count(FILE_TYPES[options.kind]),
        "general.quantization_version": count(_QUANTISATION_VERSION),
        f"{arch}.block_count": count(shape.num_layers),
        f"{arch}.context_length": count(settings.context_length),
        f"{arch}.embedding_length": count(shape.hidden_size),
        f"{arch}.vocab_size": count(shape.vocab_size),
        f"{arch}.feed_forward_length": (
            count(max(layer.channels for layer in layers))
            if architecture.padded
            else per_layer(lambda layer: layer.channels)
        ),
        f"{arch}.attention.head_count": per_layer(lambda layer: layer.query_heads),
        f"{arch}.attention.head_count_kv": per_layer(lambda layer: layer.kv_heads),
        f"{arch}.attention.key_length": count(shape.head_dim),
        f"{arch}.attention.value_length": count(shape.head_dim),
        f"{arch}.attention.{norm}": real(settings.epsilon),
        **rotary_metadata(decoder, architecture),
        **{f"{arch}.{key}": value for key, value in architecture.keys(decoder, settings).items()},
    }
