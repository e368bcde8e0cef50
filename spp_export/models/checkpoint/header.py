"""The header of one safetensors file: 8 bytes of length, JSON, and data without overlap or hole."""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spp_export.common.errors import CheckpointError
from spp_export.common.json_files import MAX_JSON_BYTES, decode_utf8, parse_json
from spp_export.models.checkpoint.dtypes import element_bytes

# A tenth of a kilobyte per tensor is usual, and no model we slice has a hundred thousand.
MAX_HEADER_BYTES = MAX_JSON_BYTES
MAX_TENSORS = 100_000
# Each tensor has an object, two lists, and as strings its name, three keys and its dtype; beside
# them are the header itself and its metadata.
_MOST_OF = {b"{": MAX_TENSORS + 2, b"[": 2 * MAX_TENSORS, b'"': 10 * MAX_TENSORS + 10_000}
_MAX_RANK = 8
_MAX_SIZE = 1 << 48
_LENGTH = struct.Struct("<Q")
_DAMAGED = "The file is damaged or truncated; fetch it again."


# What a file cannot change without: device, inode, size, time of the last change in nanoseconds.
Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `nbytes` bytes from `offset` of `file`, row-major, little-endian.

    stamp: of the file when its header was read; None for one that is not there to be read.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stamp: Stamp | None = field(default=None, compare=False, repr=False)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file by name, in the order of its data.

    Raises CheckpointError, naming the file and where possible the tensor, for anything that the
    format does not allow.
    """
    data, status = _header_bytes(file)
    size, stamp = status.st_size, stamp_of(status)
    text = decode_utf8(data, what=f"{file}: header", error=CheckpointError)
    if not text.startswith("{"):
        raise CheckpointError(f"{file}: the header does not start with '{{'. {_DAMAGED}")
    # Parsed, they would take a hundred times the memory of their text.
    if any(data.count(sign) > most for sign, most in _MOST_OF.items()):
        raise CheckpointError(
            f"{file}: the header is of more than {MAX_TENSORS} tensors, the most that are read. "
            "The file is damaged or no model."
        )
    entries = parse_json(text, what=f"{file}: header", error=CheckpointError)
    _check_metadata(entries.pop("__metadata__", {}), file)
    start = _LENGTH.size + len(data)
    tensors = [_tensor(name, entry, file, start, stamp) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_layout(tensors, file, start, size)
    return {tensor.name: tensor for tensor in tensors}


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file with this status."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def show(name: str) -> str:
    """A tensor's name for a message: on one line, and not longer than a line."""
    return repr(name if len(name) <= 120 else f"{name[:117]}...")


def _header_bytes(file: Path) -> tuple[bytes, os.stat_result]:
    """The JSON of a file's header, of no more bytes than the file has, and the file's status."""
    try:
        with open(file, "rb", opener=_without_waiting) as handle:
            status = os.fstat(handle.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{file}: expected a regular file.")
            length = _header_length(handle.read(_LENGTH.size), status.st_size, file)
            data = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error
    if len(data) < length:
        raise CheckpointError(f"{file}: the file ends inside its header. {_DAMAGED}")
    return data, status


def _without_waiting(path: str, flags: int) -> int:
    """An opener that does not block on a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _header_length(prefix: bytes, size: int, file: Path) -> int:
    if len(prefix) < _LENGTH.size:
        raise CheckpointError(
            f"{file}: {size} bytes are too few for a safetensors file. {_DAMAGED}"
        )
    length = int(_LENGTH.unpack(prefix)[0])
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: the header claims {length} bytes, at most {MAX_HEADER_BYTES} are allowed. "
            "The file is damaged or no safetensors file."
        )
    if length > size - _LENGTH.size:
        raise CheckpointError(
            f"{file}: the header claims {length} bytes, the file has {size}. {_DAMAGED}"
        )
    return length


def _check_metadata(metadata: Any, file: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{file}: __metadata__ must be an object of strings. "
            "Save the model again with the safetensors library."
        )


def _tensor(name: str, entry: Any, file: Path, start: int, stamp: Stamp) -> StoredTensor:
    label = f"{file}: tensor {show(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{label}: expected dtype, shape and data_offsets in the header. {_DAMAGED}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise CheckpointError(f"{label}: dtype must be a string. {_DAMAGED}")
    item = element_bytes(dtype, label=label)
    if not _is_sizes(shape) or len(shape) > _MAX_RANK:
        raise CheckpointError(
            f"{label}: shape must be at most {_MAX_RANK} sizes, none negative. {_DAMAGED}"
        )
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{label}: data_offsets must be a begin and an end. {_DAMAGED}")
    begin, end = offsets
    nbytes = item
    for length in shape:
        nbytes *= length
    if nbytes != end - begin:
        raise CheckpointError(
            f"{label}: {dtype} of shape {shape} takes {nbytes} bytes, "
            f"its data_offsets span {end - begin}. {_DAMAGED}"
        )
    return StoredTensor(name, file, dtype, tuple(shape), start + begin, nbytes, stamp)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < _MAX_SIZE for item in value
    )


def _check_layout(tensors: list[StoredTensor], file: Path, start: int, size: int) -> None:
    """Data must fill the file from the header to the end, in some order, each byte once."""
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps the one before it" if tensor.offset < end else "leaves a hole before"
            raise CheckpointError(
                f"{file}: tensor {show(tensor.name)} {what}: its data starts at byte "
                f"{tensor.offset}, expected {end}. {_DAMAGED}"
            )
        end += tensor.nbytes
    if end != size:
        last = f" (the last is {show(tensors[-1].name)})" if tensors else ""
        raise CheckpointError(
            f"{file}: the tensors end at byte {end}, the file has {size}{last}. {_DAMAGED}"
        )
