"""What may be chosen about a GGUF file, and the types that its tensors are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Literal, get_args

from spp_export.common.errors import UsageError
from spp_export.common.installation import install_command, require_package
from spp_export.formats.format import FormatOptions

Precision = Literal["fp32", "fp16", "bf16"]
# Blocks of 32 values of a row with one scale.
Quant = Literal["q8_0", "q4_0"]
# How one tensor is stored.
Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
QUANTS: tuple[Quant, ...] = get_args(Quant)
BLOCK = 32

# Counts up where the same checkpoint and options would give another file.
FILE_VERSION = 1
GGUF_NAME = "model.gguf"

# The number that general.file_type has for what most tensors are stored in.
FILE_TYPES: Mapping[Kind, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
_KINDS: Mapping[Precision, Kind] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_STORED: Mapping[str, Precision] = {"F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class GgufOptions(FormatOptions):
    """The form of a GGUF file. `precision` None is that of the checkpoint."""

    precision: Precision | None = field(
        default=None, metadata={"help": "Of a GGUF file: the stored one."}
    )
    quant: Quant | None = field(
        default=None, metadata={"help": "Of a GGUF file: q8_0 or q4_0, in blocks of 32 weights."}
    )

    def check(self, device: str | None = None) -> None:
        """UsageError for options that exclude each other; the file is checked on the CPU, whatever
        the device.
        """
        super().check(device)
        if self.quant and self.precision:
            raise UsageError(
                f"--precision {self.precision}: --quant {self.quant} decides how weights are "
                "stored. Drop one of them."
            )

    def resolved(self, stored_dtype: str) -> GgufOptions:
        """The same with a precision, for a checkpoint in `stored_dtype` ("F32", "BF16", ...)."""
        if self.precision or self.quant:
            return self
        return replace(self, precision=_STORED.get(stored_dtype, "fp32"))

    @property
    def kind(self) -> Kind:
        """How most matrices are stored; of resolved options."""
        assert self.quant or self.precision
        return self.quant or _KINDS[self.precision or "fp32"]

    @property
    def element_bytes(self) -> int:
        """Of one value that is not quantised; of resolved options."""
        return 4 if self.kind == "f32" else 2


def require(name: str = "gguf") -> ModuleType:
    """An optional library by its import name; UsageError that says how to install it."""
    return require_package(name, "GGUF", lambda: install_command(name, extra=False))
