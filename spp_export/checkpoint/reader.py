"""Reads a directory of safetensors files by `pread`, never by `mmap`.

Mapped pages count as resident memory until the kernel takes them back, which would make the peak
of a long export as large as the model.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from spp_export.checkpoint.dtypes import Bits, Floats, all_finite, bits_dtype, to_float
from spp_export.checkpoint.header import StoredTensor, read_header, show
from spp_export.errors import CheckpointError
from spp_export.jsonio import read_json

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
BLOCK_BYTES = 4 << 20
_MAX_INDEX_BYTES = 64 << 20


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint directory by name; only headers are read.

    As in transformers, `model.safetensors` wins over an index, and safetensors files that the
    index does not name are not part of the model. Raises CheckpointError where a file is missing
    or malformed, or where index and files disagree about a name.
    """
    if os.path.lexists(directory / WEIGHTS_NAME):
        return read_header(model_file(directory, WEIGHTS_NAME))
    if not os.path.lexists(directory / INDEX_NAME):
        raise CheckpointError(_nothing_to_read(directory))
    index = model_file(directory, INDEX_NAME)
    weight_map = _weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        found = read_header(model_file(directory, name))
        _check_against_index(index, weight_map, name, found)
        tensors |= found
    return tensors


def model_file(directory: Path, name: str) -> Path:
    """The file `name` of a model directory, which may come from a hostile index.

    It must be a plain name of a regular file that lies in the directory itself. One kind of link
    is followed: that of a Hugging Face cache, `snapshots/<revision>/<name>` to `blobs/<hash>`.
    Raises CheckpointError.
    """
    if name in ("", ".", "..") or any(char in name for char in "/\\\0"):
        raise CheckpointError(
            f"{directory}: {name[:120]!r} is not a plain file name. "
            "The index is damaged or hostile; fetch the model again."
        )
    root = directory.resolve()
    try:
        path = (root / name).resolve(strict=True)
        regular = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        raise CheckpointError(f"{directory / name}: no such file. Fetch the model again.") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise CheckpointError(f"{directory / name}: cannot be read ({reason}).") from error
    in_cache = root.parent.name == "snapshots" and path.parent == root.parent.parent / "blobs"
    if path.parent != root and not in_cache:
        raise CheckpointError(
            f"{directory / name}: is a link that leads out of the model's directory. "
            "Copy the file itself into the directory."
        )
    if not regular:
        raise CheckpointError(f"{directory / name}: expected a regular file.")
    return path


def blocks(tensor: StoredTensor, block_bytes: int = BLOCK_BYTES) -> Iterator[Bits]:
    """A tensor's elements as raw bits, in blocks of whole rows of about `block_bytes`.

    A block has the tensor's shape but for the first axis; each is a fresh array. Raises
    CheckpointError, naming the tensor, where the file ends early or a value is not finite.
    """
    rows = tensor.shape[0] if tensor.shape else 1
    row_bytes = max(1, tensor.nbytes // max(1, rows))
    step = max(1, block_bytes // row_bytes)
    with _opened(tensor) as descriptor:
        for start in range(0, rows, step):
            count = min(step, rows - start)
            bits = np.empty((count, *tensor.shape[1:]), bits_dtype(tensor.dtype))
            _pread(descriptor, bits, tensor.offset + start * row_bytes, tensor)
            if not all_finite(bits, tensor.dtype):
                raise CheckpointError(
                    f"{tensor.file}: tensor {show(tensor.name)} has a value that is not finite "
                    f"in rows {start} to {start + count - 1}. The checkpoint is damaged."
                )
            yield bits


def as_array(tensor: StoredTensor) -> Bits:
    """A whole tensor as raw bits: unsigned integers of the element's size, in its shape.

    Errors as of `blocks`.
    """
    array = np.empty(tensor.shape or (1,), bits_dtype(tensor.dtype))
    start = 0
    for block in blocks(tensor):
        array[start : start + len(block)] = block
        start += len(block)
    return array.reshape(tensor.shape)


def read(tensor: StoredTensor) -> memoryview:
    """A whole tensor's bytes as stored. Errors as of `blocks`."""
    return as_bytes(as_array(tensor))


def as_bytes(bits: Bits) -> memoryview:
    """The memory of a contiguous array, without a copy."""
    assert bits.flags.c_contiguous
    return bits.reshape(-1).view(np.uint8).data


def read_float(tensor: StoredTensor) -> Floats:
    """A whole tensor as float32 (float64 for F64), exact, with no second copy in memory.

    Errors as of `blocks`.
    """
    kind = np.float64 if tensor.dtype == "F64" else np.float32
    values: Floats = np.empty(tensor.shape or (1,), kind)
    start = 0
    for block in blocks(tensor):
        values[start : start + len(block)] = to_float(block, tensor.dtype)
        start += len(block)
    return values.reshape(tensor.shape)


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pairs = zip(blocks(one), blocks(other), strict=True)
    return all(np.array_equal(left, right) for left, right in pairs)


@contextmanager
def _opened(tensor: StoredTensor) -> Iterator[int]:
    try:
        descriptor = os.open(tensor.file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{tensor.file}: cannot be read ({error.strerror}).") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _pread(descriptor: int, bits: Bits, offset: int, tensor: StoredTensor) -> None:
    buffer = as_bytes(bits)
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{tensor.file}: cannot be read ({error.strerror}).") from error
        if count == 0:
            raise CheckpointError(
                f"{tensor.file}: the file ends inside tensor {show(tensor.name)}. "
                "It was cut short while being read; fetch it again."
            )
        done += count


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index, what="index", max_bytes=_MAX_INDEX_BYTES, error=CheckpointError)
    weight_map: Any = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected an object with weight_map. Fetch it again.")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{index}: tensor {show(name)}: expected a file name, got {file!r:.40}."
            )
    return weight_map


def _check_against_index(
    index: Path, weight_map: dict[str, str], file: str, found: dict[str, StoredTensor]
) -> None:
    promised = {name for name, where in weight_map.items() if where == file}
    if missing := sorted(promised - found.keys()):
        raise CheckpointError(
            f"{index}: tensor {show(missing[0])} should be in {file} and is not. "
            "Index and files are of different models; fetch both again."
        )
    if extra := sorted(found.keys() - promised):
        raise CheckpointError(
            f"{index}: tensor {show(extra[0])} is in {file}, which the index does not say. "
            "Index and files are of different models; fetch both again."
        )


def _nothing_to_read(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory}: no such directory."
    pickles = sorted(path.name for path in directory.glob("pytorch_model*.bin*"))
    if pickles:
        return (
            f"{directory}: has {pickles[0]} but no safetensors, and pickles are not read. Convert "
            "it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR), then copy "
            "the tokenizer's files."
        )
    return (
        f"{directory}: expected {WEIGHTS_NAME} or {INDEX_NAME}. "
        "Give a Hugging Face model directory with safetensors weights."
    )
