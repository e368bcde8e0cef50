"""Running an exported ONNX directory with ONNX Runtime: no PyTorch needed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spp_export.common.errors import UsageError
from spp_export.common.installation import install_command
from spp_export.formats.onnx.runtime.generation import Chooser, Sampling, generate, greedy
from spp_export.formats.onnx.runtime.model import Decoding, OrtModel
from spp_export.formats.onnx.runtime.providers import session

if TYPE_CHECKING:
    from spp_export.formats.onnx.runtime.optimum import ORTSlimForCausalLM

__all__ = [
    "Chooser",
    "Decoding",
    "ORTSlimForCausalLM",
    "OrtModel",
    "Sampling",
    "generate",
    "greedy",
    "session",
]


def __getattr__(name: str) -> Any:
    """The class that needs PyTorch and optimum, when it is asked for."""
    if name != "ORTSlimForCausalLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return import_module("spp_export.formats.onnx.runtime.optimum").ORTSlimForCausalLM
    except ModuleNotFoundError as error:
        if error.name not in {"optimum", "optimum.onnxruntime"}:
            raise
        raise UsageError(
            f"{name} needs the package optimum-onnx. Run: {install_command('optimum')}"
        ) from error
