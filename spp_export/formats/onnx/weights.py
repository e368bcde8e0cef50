"""A checkpoint's tensors in the form an ONNX graph wants them, read when they are written.

`MatMul` multiplies by [in, out] where PyTorch stores [out, in], and projections that read the same
input are one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import CheckpointError
from spp_export.formats.onnx.options import STORED, Precision
from spp_export.models.checkpoint.dtypes import Bits, all_finite, bits_dtype, from_float, to_float
from spp_export.models.checkpoint.header import StoredTensor, show
from spp_export.models.checkpoint.reader import blocks

_NUMPY = {"F32": np.float32, "F16": np.float16}

Array = NDArray[Any]

# Rows transposed at a time. All at once, every value read would be a miss of the cache: five to ten
# times slower.
_STRIP = 16
# Small enough that a block and what it is turned into stay in the processor's cache.
_BLOCK_BYTES = 1 << 20


def vector(stored: Sequence[StoredTensor], precision: Precision) -> Callable[[], Array]:
    """Reader of tensors [n] one after the other."""
    return lambda: np.concatenate([rows(tensor, precision) for tensor in stored])


def table(stored: StoredTensor, precision: Precision) -> Callable[[], Array]:
    """Reader of a tensor as it is stored, in `precision`."""
    return lambda: rows(stored, precision)


def matrix(stored: Sequence[StoredTensor], precision: Precision) -> Callable[[], Array]:
    """Reader of weights [out_i, in] as one matrix [in, sum out_i]."""

    def read() -> Array:
        width, bits = sum(tensor.shape[0] for tensor in stored), bits_dtype(STORED[precision])
        result, row = np.empty((stored[0].shape[1], width), bits), 0
        for block in (block for tensor in stored for block in _blocks(tensor, precision)):
            for start in range(0, len(block), _STRIP):
                strip = block[start : start + _STRIP]
                result[:, row : row + len(strip)] = strip.T
                row += len(strip)
        return result.view(_numpy_type(STORED[precision]))

    return read


def rows(tensor: StoredTensor, precision: Precision) -> Array:
    """A whole tensor in `precision`, rounded once where it is stored wider.

    Raises CheckpointError for a value that does not fit, or is not finite.
    """
    dtype = STORED[precision]
    result, row = np.empty(tensor.shape, bits_dtype(dtype)), 0
    for block in _blocks(tensor, precision):
        result[row : row + len(block)] = block
        row += len(block)
    return result.view(_numpy_type(dtype))


def _blocks(tensor: StoredTensor, precision: Precision) -> Iterator[Bits]:
    """A tensor's bits in `precision`, some rows at a time. Errors as of `rows`."""
    dtype = STORED[precision]
    for block in blocks(tensor, _BLOCK_BYTES):
        if tensor.dtype == dtype:
            yield block
            continue
        bits = from_float(to_float(block, tensor.dtype), dtype)
        if not all_finite(bits, dtype):
            raise CheckpointError(
                f"{tensor.file}: tensor {show(tensor.name)} has a value too large for {precision}. "
                "Use --precision fp32."
            )
        yield bits


def rounded(values: NDArray[np.float32], precision: Precision) -> Array:
    """Values that are small by construction, in `precision`."""
    dtype = STORED[precision]
    return from_float(np.ascontiguousarray(values), dtype).view(_numpy_type(dtype))


def _numpy_type(dtype: str) -> Any:
    if dtype in _NUMPY:
        return _NUMPY[dtype]
    import ml_dtypes  # comes with onnx_ir

    return ml_dtypes.bfloat16
