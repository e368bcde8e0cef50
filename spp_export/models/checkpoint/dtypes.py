"""Element types of safetensors files, kept as raw bits until numbers are needed.

Copying and slicing move bits and never convert. Only compensation turns a tensor into floats and
back, and then rounds to nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import CheckpointError

Bits = NDArray[np.unsignedinteger[Any]]
Floats = NDArray[np.floating[Any]]

# Every type of a whole number of bytes that the safetensors format names.
ELEMENT_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}

# What a sliceable weight may be, and the name that torch and config.json have for it.
FLOAT_DTYPES: Mapping[str, str] = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
# Bits of the largest finite magnitude of each of these.
_LARGEST: Mapping[str, int] = {
    "F16": 0x7BFF,
    "BF16": 0x7F7F,
    "F32": 0x7F7F_FFFF,
    "F64": 0x7FEF_FFFF_FFFF_FFFF,
}
_NUMBERS: Mapping[str, str] = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_STEP = 1 << 20


def bits_dtype(dtype: str) -> np.dtype[Any]:
    """Unsigned integer of the same size as one element of `dtype`, little-endian as stored."""
    return np.dtype(f"<u{ELEMENT_BYTES[dtype]}")


def all_finite(bits: Bits, dtype: str) -> bool:
    """Whether no element is an infinity or a NaN; True for a dtype not in `FLOAT_DTYPES`."""
    largest = _LARGEST.get(dtype)
    if largest is None:
        return True
    flat = bits.reshape(-1)
    magnitude = flat.dtype.type((1 << (8 * flat.itemsize - 1)) - 1)
    return all(
        int((flat[start : start + _STEP] & magnitude).max()) <= largest
        for start in range(0, flat.size, _STEP)
    )


def to_float(bits: Bits, dtype: str) -> Floats:
    """Values of stored bits, of any shape: float64 for F64, float32 for the rest; exact."""
    if dtype == "BF16":
        wide = bits.astype("<u4")
        wide <<= np.uint32(16)
        return wide.view("<f4")
    values: Floats = bits.view(_NUMBERS[dtype])
    return values.astype(np.float32) if dtype == "F16" else values.copy()


def from_float(values: Floats, dtype: str) -> Bits:
    """Bits of `values` in `dtype`, rounded once to nearest, ties to even; of the type they have
    already, the memory of `values` itself.

    Too large a value becomes an infinity, as IEEE 754 has it: check with `all_finite`.
    """
    if dtype == "F16" and values.dtype == np.float32:
        return _half(values)
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            rounded: Bits = values.astype(_NUMBERS[dtype], copy=False).view(bits_dtype(dtype))
            return rounded
        single = values.astype("<f4")
    bits = single.view("<u4")
    if values.dtype == np.float64:
        bits = _round_to_odd(values, single)
    nan = np.isnan(single)
    # Half of the last kept place, or just below it where that place is even.
    bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    upper: Bits = (bits >> np.uint32(16)).astype("<u2")
    upper[nan] = 0x7FC0
    return upper


def as_stored(values: Floats, dtype: str) -> Floats:
    """Values rounded as `from_float` does."""
    return to_float(from_float(values, dtype), dtype)


def _half(values: Floats) -> Bits:
    """By torch, which uses the processor's own conversion: numpy's takes twice as long, and for
    numbers below the smallest normal one fifty times."""
    import torch

    bits: Bits = torch.from_numpy(values).to(torch.float16).numpy().view("<u2")
    return bits


def _round_to_odd(values: Floats, single: Floats) -> Bits:
    """Bits of float64 `values` as float32, odd wherever inexact.

    A second rounding to a shorter type then gives what one rounding would (Boldo and Melquiond,
    "Emulation of FMA and correctly rounded sums", IEEE Transactions on Computers 57(4), 2008).
    """
    bits: Bits = single.view("<u4").copy()
    finite = np.isfinite(single)
    with np.errstate(invalid="ignore"):
        bits[finite & (np.abs(single) > np.abs(values))] -= np.uint32(1)
        bits[finite & (single != values)] |= np.uint32(1)
    return bits


def element_bytes(dtype: str, *, label: str) -> int:
    """Bytes of one element; CheckpointError, starting with `label`, for a type we do not know."""
    try:
        return ELEMENT_BYTES[dtype]
    except KeyError:
        raise CheckpointError(
            f"{label}: dtype {dtype[:40]!r} is not known; expected one of "
            f"{', '.join(ELEMENT_BYTES)}."
        ) from None
