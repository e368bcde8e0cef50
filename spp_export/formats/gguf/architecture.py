"""Which of llama.cpp's architectures computes a decoder, as its own loaders have it.

Most of them size every layer like the first. Where layers differ, `deci` is a Llama that does not,
and `openelm` a Qwen3 whose output matrix is always the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spp_export.common.errors import ModelError
from spp_export.formats.settings import rotation, settings_of
from spp_export.models.checkpoint.checkpoint import Checkpoint

Name = Literal["llama", "deci", "qwen2", "qwen3", "openelm"]


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp wants the weights.

    interleaved  it rotates neighbours: rows of q and k are reordered from halves to pairs
    fused        q, k and v are one matrix
    frequencies  it reads factors of the rotary frequencies from a tensor
    """

    name: Name
    interleaved: bool = False
    fused: bool = False
    frequencies: bool = False


_ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True, frequencies=True),
    "deci": Architecture("deci", interleaved=True, frequencies=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "openelm": Architecture("openelm", fused=True),
}


def architecture_of(decoder: Checkpoint) -> Architecture:
    """The architecture to write a decoder as: its family's own where that can hold it.

    Raises ModelError for a decoder that llama.cpp cannot compute.
    """
    name = decoder.family.model_type
    _check_windows(decoder)
    if decoder.shape.qk_norm:
        return _ARCHITECTURES[_normalised(decoder)]
    uniform = len(set(decoder.layers)) == 1
    if not uniform:
        return _ARCHITECTURES["deci"]
    return _ARCHITECTURES["qwen2" if name == "qwen2" and _stock_qwen2(decoder) else "llama"]


def _check_windows(decoder: Checkpoint) -> None:
    """A window that is as long as the context never hides anything."""
    settings = settings_of(decoder)
    context = settings.context_length
    short = [w for w in settings.windows if w is not None and w < context]
    if short:
        raise ModelError(
            f"GGUF: this {decoder.family.model_type} sees the last {short[0]} tokens only (sliding "
            "window), which llama.cpp's Llama does not. Export safetensors or ONNX."
        )


def _stock_qwen2(decoder: Checkpoint) -> bool:
    """Its loader wants queries as wide as the hidden state, biases on q, k and v alone, and no
    factors of frequencies."""
    shape = decoder.shape
    width = decoder.layers[0].query_heads * shape.head_dim
    extra = shape.output_bias or shape.mlp_bias or shape.down_bias
    kind = rotation(settings_of(decoder), decoder.family, shape.head_dim).kind
    return width == shape.hidden_size and not extra and kind != "llama3"


def _normalised(decoder: Checkpoint) -> Name:
    shape = decoder.shape
    if shape.qkv_bias or shape.output_bias or shape.mlp_bias or shape.down_bias:
        raise ModelError(
            "GGUF: llama.cpp's Qwen3 has no biases, and this checkpoint has some. Use compensation "
            "'lstsq' or 'none' if 'bias' made them; else export safetensors or ONNX."
        )
    if len(set(decoder.layers)) == 1:
        return "qwen3"
    if not shape.tied_embeddings:
        raise ModelError(
            "GGUF: llama.cpp has no Qwen3 with layers that differ and an output matrix of its own. "
            "Use --layout uniform, or export safetensors or ONNX."
        )
    return "openelm"
