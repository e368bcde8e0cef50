"""What may be chosen about a GGUF file, and the types that its tensors are stored in."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any, Literal

from spp_export.common.errors import UsageError

Precision = Literal["fp32", "fp16", "bf16"]
# Blocks of 32 values of a row with one scale, and for q4_1 and q5_1 a minimum too.
Quant = Literal["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
# How one tensor is stored.
Kind = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
QUANTS: tuple[Quant, ...] = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
BLOCK = 32

# Counts up where the same checkpoint and options would give another file.
FILE_VERSION = 1
GGUF_NAME = "model.gguf"

# The number that general.file_type has for what most tensors are stored in.
FILE_TYPES: Mapping[Kind, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "bf16": 32,
}
_KINDS: Mapping[Precision, Kind] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_STORED: Mapping[str, Precision] = {"F16": "fp16", "BF16": "bf16"}

# The extra also has a llama.cpp, xllamacpp.
INSTALL = "pip install 'spp-export[gguf]'"


@dataclass(frozen=True)
class GgufOptions:
    """The form of a GGUF file. `precision` None is that of the checkpoint."""

    precision: Precision | None = None
    quant: Quant | None = None

    def check(self) -> None:
        """UsageError for a form that cannot be."""
        known: tuple[tuple[str, str | None, tuple[str, ...]], ...] = (
            ("--precision", self.precision, PRECISIONS),
            ("--quant", self.quant, QUANTS),
        )
        for flag, value, allowed in known:
            if value is not None and value not in allowed:
                raise UsageError(f"{flag} {value!s:.40}: expected one of {', '.join(allowed)}.")
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

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        return asdict(self)


def require(name: str = "gguf") -> ModuleType:
    """An optional library by its import name; UsageError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # The library's own missing parts are another matter than the library missing.
        if error.name != name.partition(".")[0]:
            raise
        raise UsageError(f"GGUF needs the package {error.name}. Run: {INSTALL}") from error
