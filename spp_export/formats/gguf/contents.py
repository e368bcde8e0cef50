"""Everything a GGUF file of a checkpoint is to hold, before a byte of it is written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_export.formats.decoder import Decoder
from spp_export.formats.gguf.architecture import Architecture, architecture_of
from spp_export.formats.gguf.metadata import model_metadata
from spp_export.formats.gguf.options import GgufOptions
from spp_export.formats.gguf.tensors import GgufTensor, gguf_tensors
from spp_export.formats.gguf.tokenizer import tokenizer_metadata
from spp_export.formats.gguf.values import Metadata


@dataclass(frozen=True)
class Contents:
    """Metadata and tensors, in the order of the file; `options` are resolved."""

    architecture: Architecture
    options: GgufOptions
    metadata: Metadata
    tensors: tuple[GgufTensor, ...]

    @property
    def fallbacks(self) -> tuple[GgufTensor, ...]:
        """Tensors whose rows are no multiple of a block, and so not quantised as asked."""
        return tuple(tensor for tensor in self.tensors if tensor.wanted)

    def summary(self) -> dict[str, Any]:
        """For verify.json and config.json."""
        counted = Counter(tensor.kind for tensor in self.tensors)
        return {
            "architecture": self.architecture.name,
            **self.options.to_dict(),
            "tensors": dict(sorted(counted.items())),
            "not_quantised": [tensor.name for tensor in self.fallbacks],
        }


def gguf_contents(decoder: Decoder, tokenizer: Path, options: GgufOptions, name: str) -> Contents:
    """What the file of a decoder holds, with the tokenizer of a directory.

    `name` is what users are shown. Raises ModelError for what llama.cpp cannot run.
    """
    options.check()
    stored = decoder.tensors[f"{decoder.family.layer_name(0, decoder.family.query)}.weight"]
    resolved = options.resolved(stored.dtype)
    architecture = architecture_of(decoder)
    metadata = model_metadata(decoder, architecture, resolved, name)
    metadata |= tokenizer_metadata(tokenizer, decoder.shape.vocab_size, decoder.config)
    return Contents(architecture, resolved, metadata, gguf_tensors(decoder, architecture, resolved))
