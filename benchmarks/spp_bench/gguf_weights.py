"""Bytes of a GGUF file's weights and cache, read off its header."""

from __future__ import annotations

from pathlib import Path

from spp_bench.onnx_weights import StoredWeights
from spp_export.formats.gguf.header import read_gguf

# llama.cpp's cache has a multiple of this many tokens for each sequence.
CACHE_BLOCK = 256
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


def stored_weights(directory: Path) -> StoredWeights:
    """Add up the tensors of `model.gguf`. A step reads rows of an embedding, unless it is the
    output matrix too."""
    tensors = read_gguf(directory).tensors
    total = sum(tensor.nbytes for tensor in tensors.values())
    rows_only = tensors[_EMBEDDING].nbytes if _OUTPUT in tensors else 0
    return StoredWeights(total, total - rows_only)


def cached_heads(directory: Path) -> int:
    """KV heads of all layers, as the file has them."""
    metadata = read_gguf(directory).metadata
    architecture = metadata["general.architecture"].items
    layers = metadata[f"{architecture}.block_count"].items
    heads = metadata[f"{architecture}.attention.head_count_kv"].items
    assert isinstance(layers, int)
    each = heads if isinstance(heads, tuple) else (heads,) * layers
    return sum(int(count) for count in each)
