"""The weights that a GGUF file holds, under the names of the checkpoint they came from."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import CheckpointError
from spp_export.formats.gguf.encode import decode, row_bytes
from spp_export.formats.gguf.header import GgufFile
from spp_export.formats.gguf.options import Kind
from spp_export.formats.gguf.tensors import GgufTensor
from spp_export.formats.gguf.write import deinterleave


class GgufWeights:
    """Reads one tensor at a time, as float32 in PyTorch's layout; quantised ones as they multiply.

    `tensors` are those that the file was found to hold.
    """

    def __init__(self, file: GgufFile, tensors: Sequence[GgufTensor]) -> None:
        self._file = file
        self._parts: dict[str, tuple[GgufTensor, int, tuple[int, ...]]] = {}
        for tensor in tensors:
            first = 0
            for source, shape in zip(tensor.sources, tensor.shapes, strict=True):
                self._parts[source] = (tensor, first, shape)
                first += shape[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that the checkpoint had."""
        return tuple(self._parts)

    def kind(self, name: str) -> Kind:
        """How a tensor is stored."""
        return self._parts[name][0].kind

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor by its name in the checkpoint. CheckpointError where the file ends early."""
        tensor, first, shape = self._parts[name]
        columns = shape[1] if len(shape) > 1 else 1
        width = row_bytes(columns, tensor.kind)
        place = self._file.tensors[tensor.name]
        data = self._bytes(place.offset + first * width, shape[0] * width)
        values = decode(data, columns, tensor.kind).reshape(shape)
        if tensor.step:
            values = deinterleave(values, tensor.step)
        return values.astype(np.float32, copy=False)

    def plain(self, tensor: GgufTensor) -> NDArray[np.float32]:
        """A tensor that is in no checkpoint."""
        place = self._file.tensors[tensor.name]
        data = self._bytes(place.offset, place.nbytes)
        return decode(data, tensor.shape[-1], tensor.kind).reshape(tensor.shape)

    def _bytes(self, offset: int, count: int) -> NDArray[np.uint8]:
        data = np.empty(count, np.uint8)
        done = 0
        with self._file.path.open("rb") as handle:
            while done < count:
                received = os.preadv(handle.fileno(), [data[done:].data], offset + done)
                if not received:
                    raise CheckpointError(f"{self._file.path}: ends early. Export it again.")
                done += received
        return data
