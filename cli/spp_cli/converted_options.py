"""The options of an ONNX graph and of a GGUF file, as commands share them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spp_export.common.errors import UsageError

if TYPE_CHECKING:
    from spp_export.formats.gguf import GgufOptions
    from spp_export.formats.onnx import Attention, OnnxOptions, Precision


def converted_options(
    output_format: str,
    attention: Attention | None,
    precision: Precision | None,
    quant: str | None,
    device: str,
) -> OnnxOptions | GgufOptions | None:
    """What was asked of a graph or a file; None for safetensors, which none of these may be given
    for."""
    given = {"--onnx-attention": attention, "--precision": precision, "--quant": quant}
    if output_format == "gguf":
        return _gguf(attention, precision, quant)
    if output_format == "onnx":
        return _onnx(attention, precision, quant, device)
    for flag, value in given.items():
        if value is not None:
            also = "" if flag == "--onnx-attention" else " and GGUF"
            wanted = "onnx" if flag == "--onnx-attention" else "onnx or gguf"
            raise UsageError(f"{flag}: is for ONNX{also}. Add --format {wanted}, or drop {flag}.")
    return None


def _onnx(
    attention: Attention | None, precision: Precision | None, quant: Any, device: str
) -> OnnxOptions:
    from spp_export.formats.onnx import OnnxOptions
    from spp_export.formats.onnx.options import QUANTS

    _check_quant("onnx", quant, QUANTS)
    # The only precision of each device that every form has kernels for.
    usual: Precision = "fp16" if device.startswith("cuda") else "fp32"
    return OnnxOptions(attention or "gqa", precision or usual, quant)


def _gguf(attention: Attention | None, precision: Precision | None, quant: Any) -> GgufOptions:
    from spp_export.formats.gguf import GgufOptions
    from spp_export.formats.gguf.options import QUANTS

    if attention is not None:
        raise UsageError("--onnx-attention: is for ONNX. Add --format onnx, or drop it.")
    _check_quant("gguf", quant, QUANTS)
    return GgufOptions(precision, quant)


def _check_quant(output_format: str, quant: str | None, known: tuple[str, ...]) -> None:
    if quant is not None and quant not in known:
        raise UsageError(
            f"--quant {quant}: --format {output_format} has {', '.join(known)}. Choose one of them."
        )
