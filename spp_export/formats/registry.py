"""The formats, one line each."""

from __future__ import annotations

from spp_export.formats.format import Converter, Job
from spp_export.formats.gguf.format import _Gguf
from spp_export.formats.gguf.options import GgufOptions
from spp_export.formats.gguf.options import require as require_gguf
from spp_export.formats.onnx.format import _Onnx
from spp_export.formats.onnx.options import OnnxOptions, require_all

ConvertOptions = OnnxOptions | GgufOptions


def require_for(options: ConvertOptions, device: str | None) -> None:
    """UsageError unless the form can be, and all that it takes is installed.

    `device` None: nothing is going to be checked.
    """
    if isinstance(options, GgufOptions):
        require_gguf()
        options.check()
    else:
        require_all()
        options.check(device)


def converter(options: ConvertOptions, job: Job) -> Converter:
    """The converter to a form. Raises ModelError where the format cannot hold the model."""
    if isinstance(options, GgufOptions):
        return _Gguf(options, job)
    return _Onnx(options, job)
