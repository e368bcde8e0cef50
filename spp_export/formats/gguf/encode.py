"""Rows of numbers as the bytes of a GGUF type and back, and how far apart the two may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import CheckpointError
from spp_export.formats.gguf.options import BLOCK, Kind, require
from spp_export.models.checkpoint.dtypes import Floats, all_finite, from_float, to_float

Bytes = NDArray[np.uint8]

_PLAIN: Mapping[Kind, str] = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
# Bytes of a block of 32 values, and of a plain value.
_BLOCK_BYTES: Mapping[Kind, int] = {"q8_0": 34, "q4_0": 18}
_VALUE_BYTES: Mapping[Kind, int] = {"f32": 4, "f16": 2, "bf16": 2}
# The number that the format has for each type.
TYPE_NUMBERS: Mapping[Kind, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q8_0": 8,
    "bf16": 30,
}
# Half a step of the scale, as a share of the block's largest magnitude; a whole one where the
# scale reaches one place further on one side than on the other.
_OF_MAGNITUDE: Mapping[Kind, float] = {"q8_0": 0.5 / 127, "q4_0": 1 / 8}
# What rounding scales to half precision adds: of the magnitude, and where that is so
# small that half precision has only a few bits left.
_HALF, _TINY = 2.0**-10, 2.0**-17


def row_bytes(columns: int, kind: Kind) -> int:
    """Bytes of a row of so many values."""
    if kind in _VALUE_BYTES:
        return columns * _VALUE_BYTES[kind]
    assert columns % BLOCK == 0
    return columns // BLOCK * _BLOCK_BYTES[kind]


def encode(rows: Floats, kind: Kind, label: str) -> Bytes:
    """Rows [n, columns] as bytes; CheckpointError, starting with `label`, for too large a value."""
    if kind in _PLAIN:
        bits = from_float(np.ascontiguousarray(rows), _PLAIN[kind])
        if not all_finite(bits, _PLAIN[kind]):
            raise CheckpointError(
                f"{label} has a value too large for {kind}. Use --precision fp32."
            )
        return bits.reshape(-1).view(np.uint8)
    quants: Any = require("gguf.quants")
    single = np.ascontiguousarray(rows, np.float32)
    packed: Bytes = quants.quantize(single, _type(kind)).reshape(-1).view(np.uint8)
    return packed


def decode(data: Bytes, columns: int, kind: Kind) -> NDArray[np.float32]:
    """Rows [n, columns] of the bytes of whole rows."""
    if kind in _PLAIN:
        stored = _PLAIN[kind]
        bits = np.ascontiguousarray(data).view(f"<u{_VALUE_BYTES[kind]}")
        return to_float(bits, stored).reshape(-1, columns).astype(np.float32, copy=False)
    quants: Any = require("gguf.quants")
    packed = data.reshape(-1, row_bytes(columns, kind))
    values: NDArray[np.float32] = quants.dequantize(packed, _type(kind))
    return values.reshape(-1, columns)


def rounded(rows: Floats, kind: Kind) -> NDArray[np.float32]:
    """What a quantised type stores of rows [n, columns], their last block filled up with zeros."""
    columns = rows.shape[1]
    whole = np.pad(rows, ((0, 0), (0, -columns % BLOCK)))
    return decode(encode(whole, kind, "weight"), whole.shape[1], kind)[:, :columns]


def allowed_error(rows: Floats, kind: Kind) -> NDArray[np.float64]:
    """How far each value [n, columns] may be from what a quantised type stores of it."""
    columns = rows.shape[1]
    whole = np.pad(rows.astype(np.float64), ((0, 0), (0, -columns % BLOCK)))
    largest = np.abs(whole.reshape(-1, BLOCK)).max(axis=1)
    limit = _OF_MAGNITUDE[kind] * largest * (1 + _HALF) + _HALF * largest + _TINY
    return np.repeat(limit, BLOCK).reshape(whole.shape)[:, :columns]


def plain_values(rows: Floats, kind: Kind) -> NDArray[np.float32]:
    """What a type that is not quantised stores of rows: rounded once, to nearest."""
    stored = _PLAIN[kind]
    bits = from_float(np.ascontiguousarray(rows), stored)
    return to_float(bits, stored).astype(np.float32, copy=False)


def _type(kind: Kind) -> Any:
    return require("gguf").GGMLQuantizationType[kind.upper()]
