"""A checkpoint as a GGUF file, one block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from spp_export.common.errors import OutputError
from spp_export.common.publish import require_free_space
from spp_export.formats.gguf.contents import Contents
from spp_export.formats.gguf.encode import TYPE_NUMBERS, Bytes, encode, row_bytes
from spp_export.formats.gguf.options import GGUF_NAME, require
from spp_export.formats.gguf.tensors import GgufTensor, Source
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.checkpoint.dtypes import Floats, to_float
from spp_export.models.checkpoint.header import StoredTensor, show
from spp_export.models.checkpoint.reader import BLOCK_BYTES, blocks, read_float

ALIGNMENT = 32

# bytes done, bytes in all
Advance = Callable[[int, int], None]


def write_gguf(
    decoder: Checkpoint, contents: Contents, out: Path, *, progress: Advance | None = None
) -> None:
    """Write model.gguf to the directory `out`. Weights pass through memory in blocks.

    Raises CheckpointError for a value that does not fit, OutputError where the disk does not take
    the data, UsageError where the library is missing.
    """
    path = out / GGUF_NAME
    total = sum(stored_bytes(tensor) for tensor in contents.tensors)
    require_free_space(out, total)
    try:
        writer = _header(path, contents)
        try:
            file = writer.fout[0]
            _pad(file)
            done = 0
            for tensor in contents.tensors:
                for data in _encoded(decoder, tensor):
                    file.write(data.data)
                    done += len(data)
                    if progress:
                        progress(done, total)
                _pad(file)
        finally:
            writer.close()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}).") from error


def stored_bytes(tensor: GgufTensor) -> int:
    """Bytes of a tensor in the file, without what fills up to the next."""
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    return rows * row_bytes(tensor.shape[-1], tensor.kind)


def interleave(rows: Floats, step: int) -> Floats:
    """Rows of whole heads of `step` rows each, halves to pairs: 0, step/2, 1, step/2 + 1, ..."""
    halves = rows.reshape(-1, 2, step // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def deinterleave(rows: Floats, step: int) -> Floats:
    """The inverse of `interleave`."""
    pairs = rows.reshape(-1, step // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _header(path: Path, contents: Contents) -> Any:
    """The library's writer, after metadata and the list of tensors."""
    gguf: Any = require("gguf")
    writer = gguf.GGUFWriter(path, contents.architecture.name)
    kinds = gguf.GGUFValueType
    names = {
        "u32": kinds.UINT32,
        "i32": kinds.INT32,
        "f32": kinds.FLOAT32,
        "bool": kinds.BOOL,
        "str": kinds.STRING,
    }
    for key, value in contents.metadata.items():
        if key == "general.architecture":  # which the writer has put first
            continue
        kind = names[value.kind]
        if value.is_array:
            writer.add_key_value(key, value.items, kinds.ARRAY, kind)
        else:
            writer.add_key_value(key, value.items, kind)
    for tensor in contents.tensors:
        number = gguf.GGMLQuantizationType(TYPE_NUMBERS[tensor.kind])
        size = stored_bytes(tensor)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, number)
    writer.open_output_file(path)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _encoded(decoder: Checkpoint, tensor: GgufTensor) -> Iterator[Bytes]:
    label = f"tensor {show(tensor.name)}"
    if tensor.values is not None:
        yield encode(np.atleast_2d(tensor.values), tensor.kind, label)
    written = 0
    for source in tensor.sources:
        stored = decoder.tensors[source.name]
        for rows in _rows(stored, source, tensor.step):
            rows = tensor.changed(rows.astype(np.float32, copy=False))
            rows = interleave(rows, tensor.step) if tensor.step else rows
            written += len(rows)
            if rows.ndim > 1 and rows.shape[1] < tensor.shape[1]:
                rows = np.pad(rows, ((0, 0), (0, tensor.shape[1] - rows.shape[1])))
            yield encode(rows, tensor.kind, f"{stored.file}: tensor {show(source.name)}")
    if tensor.sources and written < tensor.shape[0]:
        zeros = np.zeros((tensor.shape[0] - written, *tensor.shape[1:]), np.float32)
        yield encode(zeros, tensor.kind, label)


def _rows(stored: StoredTensor, source: Source, step: int) -> Iterator[Floats]:
    """What a source has, some rows at a time; all at once where they are not all of a tensor's."""
    if source.rows is None and not source.turned:
        for bits in blocks(stored, _block_bytes(stored, step)):
            yield to_float(bits, stored.dtype)
        return
    whole = read_float(stored)
    whole = whole.T if source.turned else whole
    yield whole if source.rows is None else whole[source.rows]


def _block_bytes(stored: StoredTensor, step: int) -> int:
    """A size of blocks that has whole heads in each."""
    if not step:
        return BLOCK_BYTES
    head = step * stored.nbytes // stored.shape[0]
    return head * max(1, BLOCK_BYTES // head)


def _pad(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))
