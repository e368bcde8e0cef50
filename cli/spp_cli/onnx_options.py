"""The options of an ONNX graph, as commands share them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spp_export.errors import UsageError

if TYPE_CHECKING:
    from spp_export.onnx_graph import Attention, OnnxOptions, Precision, Quant


def onnx_options(
    output_format: str,
    attention: Attention | None,
    precision: Precision | None,
    quant: Quant | None,
    device: str,
) -> OnnxOptions | None:
    """What was asked of a graph; None for another format, which none of these may be given for."""
    from spp_export.onnx_graph import OnnxOptions

    given = {"--onnx-attention": attention, "--precision": precision, "--quant": quant}
    if output_format != "onnx":
        for flag, value in given.items():
            if value is not None:
                raise UsageError(f"{flag}: is for ONNX. Add --format onnx, or drop {flag}.")
        return None
    # The only precision of each device that every form has kernels for.
    usual: Precision = "fp16" if device.startswith("cuda") else "fp32"
    return OnnxOptions(attention or "gqa", precision or usual, quant)
