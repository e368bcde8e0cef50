"""Checkpoints as GGUF files for llama.cpp and what is built on it. Needs the package gguf."""

from __future__ import annotations

from spp_export.formats.gguf.options import GGUF_NAME, GgufOptions, Precision, Quant

__all__ = ["GGUF_NAME", "GgufOptions", "Precision", "Quant"]
