"""The weights that a GGUF file holds, under the names of the checkpoint they came from."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import CheckpointError
from spp_export.formats.gguf.encode import decode, row_bytes
from spp_export.formats.gguf.header import GgufFile
from spp_export.formats.gguf.options import Kind
from spp_export.formats.gguf.tensors import GgufTensor, Source
from spp_export.formats.gguf.write import deinterleave


class GgufWeights:
    """Reads one tensor at a time, as float32 in PyTorch's layout; quantised ones as they multiply.

    `tensors` are those that the file was found to hold.
    """

    def __init__(self, file: GgufFile, tensors: Sequence[GgufTensor]) -> None:
        self._file = file
        self._parts: dict[str, list[tuple[GgufTensor, int, Source]]] = {}
        for tensor in tensors:
            first = 0
            for source in tensor.sources:
                self._parts.setdefault(source.name, []).append((tensor, first, source))
                first += source.shape[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that the checkpoint had."""
        return tuple(self._parts)

    def kind(self, name: str) -> Kind:
        """How a tensor is stored."""
        return self._parts[name][0][0].kind

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor by its name in the checkpoint. CheckpointError where the file ends early."""
        return self._whole(name, self._original)

    def stored(self, name: str) -> NDArray[np.float32]:
        """The same with the values of the file, where those are others than the checkpoint's."""
        return self._whole(name, self._rows)

    def changed(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """A tensor of the checkpoint with the values that the file is to have."""
        parts = self._parts[name]
        if len(parts) == 1:
            return parts[0][0].changed(values)
        return self._whole(
            name,
            lambda tensor, first, source: tensor.changed(
                (values.T if source.turned else values)[source.rows]
            ),
        )

    def _whole(
        self, name: str, part: Callable[[GgufTensor, int, Source], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """A tensor, put together of the rows of its parts."""
        parts = self._parts[name]
        turned = parts[0][2].turned
        if len(parts) == 1:
            values = part(*parts[0])
        else:
            total = sum(source.shape[0] for _, _, source in parts)
            values = np.empty((total, *parts[0][2].shape[1:]), np.float32)
            for tensor, first, source in parts:
                values[source.rows] = part(tensor, first, source)
        return values.T if turned else values

    def _original(self, tensor: GgufTensor, first: int, source: Source) -> NDArray[np.float32]:
        values = self._rows(tensor, first, source)
        if tensor.factor == 1.0 and tensor.shift == 0.0:
            return values
        original: NDArray[np.float32] = (values - np.float32(tensor.shift)) / np.float32(
            tensor.factor
        )
        return original

    def _rows(self, tensor: GgufTensor, first: int, source: Source) -> NDArray[np.float32]:
        columns = tensor.shape[1] if len(tensor.shape) > 1 else 1
        width = row_bytes(columns, tensor.kind)
        place = self._file.tensors[tensor.name]
        data = self._bytes(place.offset + first * width, source.shape[0] * width)
        values = decode(data, columns, tensor.kind)
        if len(source.shape) > 1:
            values = values[:, : source.shape[1]]
        values = values.reshape(source.shape)
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
