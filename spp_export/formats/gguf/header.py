"""The header of an untrusted GGUF file; everything in it is checked.

Every count is held against the bytes that are there before anything of that size is made.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from spp_export.common.errors import CheckpointError
from spp_export.formats.gguf.encode import TYPE_NUMBERS, row_bytes
from spp_export.formats.gguf.options import BLOCK, GGUF_NAME, QUANTS, Kind
from spp_export.formats.gguf.values import ARRAY, SCALARS, Metadata, Plain, Scalar, Value
from spp_export.formats.gguf.write import ALIGNMENT
from spp_export.models.checkpoint.reader import model_file

_MAGIC, _VERSION = b"GGUF", 3
# A vocabulary of a million tokens with its merges takes a third of this.
_MAX_HEADER_BYTES = 256 << 20
_MAX_KEYS, _MAX_TENSORS, _MAX_ITEMS = 1 << 12, 1 << 17, 1 << 22
_MAX_DIMENSIONS = 4
_FORMATS: dict[Scalar, struct.Struct] = {
    "u32": struct.Struct("<I"),
    "i32": struct.Struct("<i"),
    "f32": struct.Struct("<f"),
    "bool": struct.Struct("<B"),
}
_KINDS: dict[int, Kind] = {number: kind for kind, number in TYPE_NUMBERS.items()}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies: `nbytes` bytes from `offset` of the file; shape as PyTorch has it."""

    kind: Kind
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """What a file says it holds."""

    path: Path
    metadata: Metadata
    tensors: dict[str, Placed]


def read_gguf(directory: Path) -> GgufFile:
    """Metadata and places of tensors of a directory's model.gguf; no weights are read.

    Raises CheckpointError for anything that spp does not write: other versions and types, tensors
    that overlap, leave holes or reach beyond the end of the file.
    """
    path = model_file(directory, GGUF_NAME)
    try:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            return _Reader(handle, path, size).file()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error


class _Reader:
    def __init__(self, handle: BinaryIO, path: Path, size: int) -> None:
        self._handle, self._path, self._size = handle, path, size
        self._left = min(size, _MAX_HEADER_BYTES)

    def file(self) -> GgufFile:
        if self._take(4) != _MAGIC or self._number(_U32) != _VERSION:
            self._refuse(f"is not GGUF of version {_VERSION}")
        tensors, keys = self._number(_U64), self._number(_U64)
        if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
            self._refuse(f"claims {tensors} tensors and {keys} keys")
        metadata: Metadata = {}
        for _ in range(keys):
            key = self._text()
            if key in metadata:
                self._refuse(f"has the key {key!r:.60} twice")
            metadata[key] = self._value()
        listed = [self._tensor() for _ in range(tensors)]
        return GgufFile(self._path, metadata, self._placed(listed))

    def _value(self) -> Value:
        number = self._number(_U32)
        if number != ARRAY:
            kind = self._scalar(number)
            return Value(kind, self._item(kind))
        kind = self._scalar(self._number(_U32))
        length = self._number(_U64)
        if length > min(_MAX_ITEMS, self._left):
            self._refuse(f"claims an array of {length} values")
        return Value(kind, tuple(self._item(kind) for _ in range(length)))

    def _scalar(self, number: int) -> Scalar:
        if number not in SCALARS:
            self._refuse(f"has a value of type {number}, which spp never writes")
        return SCALARS[number]

    def _item(self, kind: Scalar) -> Plain:
        if kind == "str":
            return self._text()
        form = _FORMATS[kind]
        value: int | float = form.unpack(self._take(form.size))[0]
        return bool(value) if kind == "bool" else value

    def _tensor(self) -> tuple[str, Kind, tuple[int, ...], int]:
        name = self._text()
        rank = self._number(_U32)
        if not 1 <= rank <= _MAX_DIMENSIONS:
            self._refuse(f"has a tensor {name!r:.60} of {rank} dimensions")
        shape = tuple(self._number(_U64) for _ in range(rank))[::-1]
        number, offset = self._number(_U32), self._number(_U64)
        if number not in _KINDS:
            self._refuse(f"tensor {name!r:.60} is of type {number}, which spp never writes")
        kind = _KINDS[number]
        if min(shape) < 1 or (kind in QUANTS and shape[-1] % BLOCK):
            self._refuse(f"tensor {name!r:.60} of type {kind} has shape {list(shape)}")
        return name, kind, shape, offset

    def _placed(self, listed: list[tuple[str, Kind, tuple[int, ...], int]]) -> dict[str, Placed]:
        """Tensors one after the other, up to the end of the file."""
        start = self._handle.tell()
        start += -start % ALIGNMENT
        end = start
        placed: dict[str, Placed] = {}
        for name, kind, shape, offset in listed:
            nbytes = math.prod(shape[:-1]) * row_bytes(shape[-1], kind)
            if name in placed or start + offset != end or end + nbytes > self._size:
                self._refuse(f"tensor {name!r:.60} does not lie where the one before it ends")
            placed[name] = Placed(kind, shape, end, nbytes)
            end += nbytes + -nbytes % ALIGNMENT
        if end != self._size:
            self._refuse(f"has {self._size} bytes, and its tensors end at {end}")
        return placed

    def _text(self) -> str:
        data = self._take(self._number(_U64))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self._refuse("has a string that is not UTF-8")

    def _number(self, form: struct.Struct) -> int:
        value: int = form.unpack(self._take(form.size))[0]
        return value

    def _take(self, count: int) -> bytes:
        if count > self._left:
            self._refuse("ends inside its header, or the header is larger than spp writes")
        self._left -= count
        data = self._handle.read(count)
        if len(data) != count:
            self._refuse("ends inside its header")
        return data

    def _refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {reason}. It is damaged or hostile; export it again.")
