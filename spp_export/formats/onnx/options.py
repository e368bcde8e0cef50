"""What may be chosen about an ONNX graph, and what no provider can run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, Literal

from spp_export.common.errors import UsageError
from spp_export.models.checkpoint.dtypes import ELEMENT_BYTES, FLOAT_DTYPES

# gqa       GroupQueryAttention with its rotary inside; right padding; shared KV buffer; fastest
# gqa-bias  the same with positions and mask from outside: padding on either side
# standard  operators of the ONNX standard alone (opset 24), for other runtimes and fp32 on CUDA
Attention = Literal["gqa", "gqa-bias", "standard"]
Precision = Literal["fp32", "fp16", "bf16"]
# int4, int8     weights only, in blocks of 64 or 32 values (MatMulNBits)
# int8-dynamic   weights per channel and activations per tensor (MatMulInteger)
Quant = Literal["int8", "int4", "int8-dynamic"]

ATTENTIONS: tuple[Attention, ...] = ("gqa", "gqa-bias", "standard")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
QUANTS: tuple[Quant, ...] = ("int8", "int4", "int8-dynamic")

# Counts up where the same checkpoint and options would give another graph: `verify` compares whole
# graphs, and must be able to say that one was written before.
GRAPH_VERSION = 1

# As safetensors spells them.
STORED: Mapping[Precision, str] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}

INSTALL = "pip install 'spp-export[onnx]'"


@dataclass(frozen=True)
class OnnxOptions:
    """The form of a graph."""

    attention: Attention = "gqa"
    precision: Precision = "fp32"
    quant: Quant | None = None

    def check(self, device: str | None = None) -> None:
        """UsageError for a form that cannot be, or that `device` ("cpu", "cuda") cannot run."""
        for name, value, known in (
            ("--onnx-attention", self.attention, ATTENTIONS),
            ("--precision", self.precision, PRECISIONS),
            ("--quant", QUANTS[0] if self.quant is None else self.quant, QUANTS),
        ):
            if value not in known:
                raise UsageError(f"{name} {value!s:.40}: expected one of {', '.join(known)}.")
        if self.quant == "int8-dynamic" and self.precision != "fp32":
            raise UsageError(
                "--quant int8-dynamic: starts from fp32 weights. Drop --precision, or use int8."
            )
        if device is None:
            return
        if device != "cpu" and not device.startswith("cuda"):
            raise UsageError(f"--device {device:.40}: ONNX Runtime checks a graph on cpu or cuda.")
        if device == "cpu" and self.precision == "bf16":
            raise UsageError(
                "--precision bf16: ONNX Runtime has no bf16 kernels on the CPU. "
                "Use fp32 or fp16, or --device cuda."
            )
        fp32_attention = self.precision == "fp32" and self.attention != "standard"
        if device.startswith("cuda") and fp32_attention:
            raise UsageError(
                "--precision fp32: GroupQueryAttention has no fp32 kernel on CUDA. "
                "Use --precision fp16 or bf16, or --onnx-attention standard."
            )

    @property
    def torch_dtype(self) -> str:
        """The precision as torch spells it ("float32")."""
        return FLOAT_DTYPES[STORED[self.precision]]

    @property
    def element_bytes(self) -> int:
        """Of one value that is not quantised."""
        return ELEMENT_BYTES[STORED[self.precision]]

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return asdict(self)


def require(name: str) -> ModuleType:
    """An optional library by its import name; UsageError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # The library's own missing parts are another matter than the library missing.
        if error.name != name.partition(".")[0]:
            raise
        raise UsageError(f"ONNX needs the package {error.name}. Run: {INSTALL}") from error


def require_all() -> None:
    """UsageError unless all that writing and checking a graph takes is installed."""
    for name in ("onnx", "onnx_ir", "onnxruntime"):
        require(name)
