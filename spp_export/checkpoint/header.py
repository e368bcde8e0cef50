"""The header of one safetensors file: 8 bytes of length, JSON, and data without overlap or hole."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_export.checkpoint.dtypes import element_bytes
from spp_export.errors import CheckpointError
from spp_export.jsonio import decode_utf8, parse_json

MAX_HEADER_BYTES = 100_000_000
_MAX_RANK = 8
_MAX_SIZE = 1 << 48
_LENGTH = struct.Struct("<Q")
_DAMAGED = "The file is damaged or truncated; fetch it again."


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `nbytes` bytes from `offset` of `file`, row-major, little-endian."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file by name, in the order of its data.

    Raises CheckpointError, naming the file and where possible the tensor, for anything that the
    format does not allow.
    """
    try:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            length = _header_length(handle.read(_LENGTH.size), size, file)
            data = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error
    text = decode_utf8(data, what=f"{file}: header", error=CheckpointError)
    if not text.startswith("{"):
        raise CheckpointError(f"{file}: the header does not start with '{{'. {_DAMAGED}")
    entries = parse_json(text, what=f"{file}: header", error=CheckpointError)
    _check_metadata(entries.pop("__metadata__", {}), file)
    start = _LENGTH.size + length
    tensors = [_tensor(name, entry, file, start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_layout(tensors, file, start, size)
    return {tensor.name: tensor for tensor in tensors}


def show(name: str) -> str:
    """A tensor's name for a message: on one line, and not longer than a line."""
    return repr(name if len(name) <= 120 else f"{name[:117]}...")


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


def _tensor(name: str, entry: Any, file: Path, start: int) -> StoredTensor:
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
    wanted = item
    for length in shape:
        wanted *= length
    if wanted != end - begin:
        raise CheckpointError(
            f"{label}: {dtype} of shape {shape} takes {wanted} bytes, "
            f"its data_offsets span {end - begin}. {_DAMAGED}"
        )
    return StoredTensor(name, file, dtype, tuple(shape), start + begin, wanted)


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
