"""A checkpoint's tensors in the form an ONNX graph wants them, read when they are written.

`MatMul` multiplies by [in, out] where PyTorch stores [out, in], and projections that read the same
input are one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Part:
    """Some outputs of a weight or a bias: all, or those of `rows`. `turned`: inputs come first."""

    stored: StoredTensor
    rows: slice | Sequence[int] = field(default_factory=lambda: slice(None))
    turned: bool = False

    @property
    def inputs(self) -> int:
        """Of a weight."""
        return self.stored.shape[0 if self.turned else 1]

    @property
    def outputs(self) -> int:
        """How many there are."""
        length = self.stored.shape[1 if self.turned else 0]
        return len(range(length)[self.rows] if isinstance(self.rows, slice) else self.rows)


def vector(parts: Sequence[Part], precision: Precision) -> Callable[[], Array]:
    """Reader of biases [n] one after the other."""
    return lambda: np.concatenate([rows(part.stored, precision)[part.rows] for part in parts])


def table(stored: StoredTensor, precision: Precision) -> Callable[[], Array]:
    """Reader of a tensor as it is stored, in `precision`."""
    return lambda: rows(stored, precision)


def matrix(parts: Sequence[Part], precision: Precision) -> Callable[[], Array]:
    """Reader of weights [out_i, in] as one matrix [in, sum out_i]."""

    def read() -> Array:
        width, bits = sum(part.outputs for part in parts), bits_dtype(STORED[precision])
        result, row = np.empty((parts[0].inputs, width), bits), 0
        for block in (block for part in parts for block in _outputs(part, precision)):
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
        np.atleast_1d(result)[row : row + len(block)] = block  # a view; one number has no rows
        row += len(block)
    return result.view(_numpy_type(dtype))


def _outputs(part: Part, precision: Precision) -> Iterator[Bits]:
    """A part's bits in `precision`, some outputs at a time; all of it where they do not lie one
    after the other."""
    if part.outputs == part.stored.shape[0] and not part.turned:
        yield from _blocks(part.stored, precision)
        return
    bits = rows(part.stored, precision).view(bits_dtype(STORED[precision]))
    yield (bits.T if part.turned else bits)[part.rows]


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
