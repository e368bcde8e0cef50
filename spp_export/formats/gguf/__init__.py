"""Checkpoints as GGUF files for llama.cpp and what is built on it. Needs the package gguf."""

from __future__ import annotations

from spp_export.formats.gguf.contents import Contents, gguf_contents
from spp_export.formats.gguf.options import GGUF_NAME, GgufOptions, Precision, Quant
from spp_export.formats.gguf.write import write_gguf

__all__ = [
    "GGUF_NAME",
    "Contents",
    "GgufOptions",
    "Precision",
    "Quant",
    "gguf_contents",
    "write_gguf",
]
