"""Reads a directory of safetensors files by `pread`, never by `mmap`.

Mapped pages count as resident memory until the kernel takes them back, which would make the peak
of a long export as large as the model.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from spp_export.common.errors import CheckpointError
from spp_export.common.json_files import MAX_JSON_BYTES, read_json, shown
from spp_export.models.checkpoint.dtypes import Bits, Floats, all_finite, bits_dtype, to_float
from spp_export.models.checkpoint.header import (
    MAX_TENSORS,
    StoredTensor,
    read_header,
    show,
    stamp_of,
)

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
BLOCK_BYTES = 4 << 20
_SUFFIX = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".bin.index.json")
_MAX_NAME = 120


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint directory by name; only headers are read.

    As in transformers, `model.safetensors` wins over an index, and safetensors files that the
    index does not name are not part of the model. Raises CheckpointError where a file is missing
    or malformed, or where index and files disagree about a name.
    """
    if os.path.lexists(directory / WEIGHTS_NAME):
        return read_header(model_file(directory, WEIGHTS_NAME))
    if not os.path.lexists(directory / INDEX_NAME):
        raise CheckpointError(nothing_to_read(directory))
    index = model_file(directory, INDEX_NAME)
    tensors: dict[str, StoredTensor] = {}
    for name, promised in sorted(_promised(index).items()):
        tensors_of_file = read_header(model_file(directory, name))
        _check_against_index(index, promised, name, tensors_of_file)
        tensors |= tensors_of_file
    return tensors


def model_file(directory: Path, name: str) -> Path:
    """The file `name` of a model directory, which may come from a hostile index.

    It must be a plain name of a regular file that lies in the directory itself; a colon would make
    it a drive on Windows. One kind of link is followed: that of a Hugging Face cache,
    `snapshots/<revision>/<name>` to `blobs/<hash>`. Raises CheckpointError.
    """
    plain = name.isprintable() and len(name) <= _MAX_NAME and not any(c in name for c in "/\\:")
    if not plain or name in ("", ".", ".."):
        raise CheckpointError(
            f"{directory}: {name[:_MAX_NAME]!r} is not a plain file name. "
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
    CheckpointError, naming the tensor, where the file has changed since its header was read, or a
    value is not finite.
    """
    if not tensor.nbytes:
        return
    rows = tensor.shape[0] if tensor.shape else 1
    row_bytes = tensor.nbytes // rows
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


def same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bits."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    pairs = zip(blocks(first), blocks(second), strict=True)
    return all(np.array_equal(left, right) for left, right in pairs)


def require_unchanged(tensors: Iterable[StoredTensor]) -> None:
    """CheckpointError where a tensor's file is not the one whose header was read any more."""
    for tensor in {tensor.file: tensor for tensor in tensors}.values():
        with _opened(tensor):
            pass


@contextmanager
def _opened(tensor: StoredTensor) -> Iterator[int]:
    """A descriptor of the tensor's file, which is the one whose header was read, before and after.

    What is written to a file that changes meanwhile would be of neither of its two states.
    """
    try:
        # O_NONBLOCK: else a pipe in its place would be waited for.
        descriptor = os.open(tensor.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{tensor.file}: cannot be read ({error.strerror}).") from error
    try:
        _check_unchanged(descriptor, tensor)
        yield descriptor
        _check_unchanged(descriptor, tensor)
    finally:
        os.close(descriptor)


def _check_unchanged(descriptor: int, tensor: StoredTensor) -> None:
    if tensor.stamp is not None and stamp_of(os.fstat(descriptor)) != tensor.stamp:
        raise CheckpointError(
            f"{tensor.file}: has changed since its header was read, at tensor "
            f"{show(tensor.name)}. Let nothing write to the model while it is read; start again."
        )


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


def _promised(index: Path) -> dict[str, set[str]]:
    """Names of tensors by the file that should hold them, as the index has it."""
    content = read_json(index, what="index", max_bytes=MAX_JSON_BYTES, error=CheckpointError)
    weight_map: Any = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected an object with weight_map. Fetch it again.")
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(
            f"{index}: names {len(weight_map)} tensors, at most {MAX_TENSORS} are allowed. "
            "It is damaged or of no model."
        )
    promised: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{index}: tensor {show(name)}: expected a file name, got {shown(file)}."
            )
        promised.setdefault(file, set()).add(name)
    for file in promised:
        # Other readers choose the format by the name: as a pickle, one file can be another model.
        if not file.endswith(_SUFFIX):
            raise CheckpointError(
                f"{index}: names the file {file[:_MAX_NAME]!r}, expected a plain file name that "
                f"ends in {_SUFFIX}. It is damaged or hostile; fetch the model again."
            )
    return promised


def _check_against_index(
    index: Path, promised: set[str], file: str, tensors: dict[str, StoredTensor]
) -> None:
    if missing := sorted(promised - tensors.keys()):
        raise CheckpointError(
            f"{index}: tensor {show(missing[0])} should be in {file} and is not. "
            "Index and files are of different models; fetch both again."
        )
    if extra := sorted(tensors.keys() - promised):
        raise CheckpointError(
            f"{index}: tensor {show(extra[0])} is in {file}, which the index does not say. "
            "Index and files are of different models; fetch both again."
        )


def nothing_to_read(directory: Path) -> str:
    """What is said of a directory without weights that are read."""
    if not directory.is_dir():
        return f"{directory}: no such directory."
    names = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{directory}: has {pickles[0]:.80} but no safetensors, and pickles are not read. "
            "Convert it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR), then "
            "copy the tokenizer's files."
        )
    if any(name.endswith(_SUFFIX) for name in names):
        return (
            f"{directory}: has safetensors, but neither {WEIGHTS_NAME} nor {INDEX_NAME}, which "
            "says what is in them. Fetch the model again."
        )
    return (
        f"{directory}: expected {WEIGHTS_NAME} or {INDEX_NAME}. "
        "Give a Hugging Face model directory with safetensors weights."
    )
