"""A checkpoint as an ONNX decoder: built node by node, its weights streamed from safetensors.

No tracing and no PyTorch model: the graph is what the family's record and the layers' shapes say.
"""

from __future__ import annotations

from spp_export.formats.onnx.options import (
    Attention,
    OnnxOptions,
    Precision,
    Quant,
)

__all__ = ["Attention", "OnnxOptions", "Precision", "Quant"]
