"""What a GGUF file says of the model."""

from __future__ import annotations

from collections.abc import Callable

from spp_export.formats.decoder import Decoder
from spp_export.formats.gguf.architecture import Architecture
from spp_export.formats.gguf.options import FILE_TYPES, GgufOptions
from spp_export.formats.gguf.rotary import rotary_metadata
from spp_export.formats.gguf.values import Metadata, Value, count, integers, real, text
from spp_export.models.shape import LayerShape

# Of the layout of quantised blocks.
_QUANTISATION_VERSION = 2


def model_metadata(
    decoder: Decoder, architecture: Architecture, options: GgufOptions, name: str
) -> Metadata:
    """Every key but the tokenizer's; `options` are resolved, `name` is shown to users.

    Raises ModelError for rotary settings that llama.cpp has not.
    """
    shape, settings, arch = decoder.shape, decoder.settings, architecture.name

    def per_layer(size: Callable[[LayerShape], int]) -> Value:
        sizes = [size(layer) for layer in decoder.layers]
        return count(sizes[0]) if len(set(decoder.layers)) == 1 else integers(sizes)

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
        f"{arch}.feed_forward_length": per_layer(lambda layer: layer.channels),
        f"{arch}.attention.head_count": per_layer(lambda layer: layer.query_heads),
        f"{arch}.attention.head_count_kv": per_layer(lambda layer: layer.kv_heads),
        f"{arch}.attention.key_length": count(shape.head_dim),
        f"{arch}.attention.value_length": count(shape.head_dim),
        f"{arch}.attention.layer_norm_rms_epsilon": real(settings.epsilon),
        **rotary_metadata(decoder, architecture),
    }
