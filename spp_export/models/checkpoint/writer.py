"""Writes safetensors shards as a stream: headers first, then data in the order of the headers.

The layout is the one of the Hugging Face libraries: `model.safetensors`, or numbered shards and
an index. While data is written, a second thread hashes it and a third sends it to the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

from spp_export.common.errors import OutputError, UsageError
from spp_export.common.manifest import FileRecord, hash_file
from spp_export.models.checkpoint.dtypes import ELEMENT_BYTES, Bits
from spp_export.models.checkpoint.reader import BLOCK_BYTES, INDEX_NAME, WEIGHTS_NAME, as_bytes

DEFAULT_SHARD_BYTES = 5_000_000_000
# Blocks that may wait for their hash: enough to keep both threads busy, little memory.
_PENDING = 4
# Shorter pieces are written and hashed together: a model may have many thousands.
_SHORT_BYTES = 1 << 16
_TOGETHER_BYTES = 1 << 20
# Written bytes that the kernel is asked to send to the disk at once. By itself it waits until much
# of the memory is full of them, and the last flush then waits for all of that.
_SEND_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        size = ELEMENT_BYTES[self.dtype]
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to be written and its tensors in the order of their data."""

    file: str
    entries: tuple[TensorEntry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, without the header."""
        return sum(entry.nbytes for entry in self.entries)


def plan_shards(
    entries: Iterable[TensorEntry], max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> tuple[Shard, ...]:
    """Fill shards with `entries` in order; a larger tensor gets a shard of its own.

    Inside a shard wider elements come first, so that each tensor is aligned to its element.
    Raises UsageError for a size below 1.
    """
    if max_shard_bytes < 1:
        raise UsageError(f"the size of a shard must be at least 1 byte, got {max_shard_bytes}.")
    groups: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    shards = []
    for number, group in enumerate(groups, start=1):
        group.sort(key=lambda entry: -ELEMENT_BYTES[entry.dtype])
        numbered = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shards.append(Shard(numbered if len(groups) > 1 else WEIGHTS_NAME, tuple(group)))
    return tuple(shards)


class ShardWriter:
    """Context that writes `shards` to `directory`; every tensor must be given, in `order`.

    After a clean exit all files are flushed to disk and `records` has size and hash of each; of
    what is not `kept`, but read and thrown away, neither is done. After an exception there is no
    index, and what is there is for the caller to throw away.
    Raises OutputError where the disk does not take the data.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard], *, kept: bool = True) -> None:
        self.records: dict[str, FileRecord] = {}
        self._kept = kept
        self._directory = directory
        self._shards = tuple(shards)
        self._todo = deque((shard, entry) for shard in shards for entry in shard.entries)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="spp-hash")
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="spp-flush")
        self._hashes: deque[Future[Any]] = deque()
        self._flushes: deque[Future[Any]] = deque()
        self._files: list[_ShardFile] = []
        self._short = bytearray()

    @property
    def order(self) -> tuple[TensorEntry, ...]:
        """The order in which tensors must be given."""
        return tuple(entry for shard in self._shards for entry in shard.entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._hasher.shutdown(cancel_futures=True)
            self._flusher.shutdown(cancel_futures=True)
            for file in self._files:
                file.handle.close()

    def write(self, name: str, blocks: Iterable[Bits]) -> None:
        """Append the next tensor, given as contiguous arrays whose bytes follow one another.

        A block must not be changed afterwards: it may still have to be hashed.
        """
        shard, entry = self._todo.popleft()
        assert name == entry.name, f"got {name}, expected {entry.name}"
        if not self._files or self._files[-1].shard is not shard:
            self._begin(shard)
        written = 0
        for block in blocks:
            data = as_bytes(block)
            for start in range(0, len(data), BLOCK_BYTES):
                self._append(data[start : start + BLOCK_BYTES])
            written += len(data)
        assert written == entry.nbytes, f"{name}: got {written} bytes, expected {entry.nbytes}"

    def _begin(self, shard: Shard) -> None:
        self._end_shard()
        path = self._directory / shard.file
        with _reporting(path):
            self._files.append(_ShardFile(shard, FileIO(path, "xb"), hashlib.sha256()))
        self._append(memoryview(header_of(shard)))

    def _append(self, data: memoryview) -> None:
        if len(data) < _SHORT_BYTES:
            self._short += data
            if len(self._short) >= _TOGETHER_BYTES:
                self._write_short()
            return
        self._write_short()
        self._write(data)

    def _write_short(self) -> None:
        if self._short:
            data, self._short = memoryview(self._short), bytearray()
            self._write(data)

    def _write(self, data: memoryview) -> None:
        file = self._files[-1]
        if self._kept:
            self._hashes.append(self._hasher.submit(file.digest.update, data))
        with _reporting(self._directory / file.shard.file):
            done = 0
            while done < len(data):
                done += file.handle.write(data[done:])
        file.size += len(data)
        if self._kept and file.size - file.sent >= _SEND_BYTES:
            begin, file.sent = file.sent, file.size
            self._flushes.append(self._flusher.submit(_send, file.handle, begin, file.size))
        while len(self._hashes) > _PENDING:
            self._hashes.popleft().result()
        while self._flushes and self._flushes[0].done():
            self._flushes.popleft().result()

    def _end_shard(self) -> None:
        if self._files:
            self._write_short()
            file = self._files[-1]
            if not self._kept:
                file.handle.close()
                return
            self._hashes.append(self._hasher.submit(self._record, file))
            self._flushes.append(self._flusher.submit(self._flush, file))

    def _record(self, file: _ShardFile) -> None:
        """Runs on the hasher, after the shard's last bytes."""
        self.records[file.shard.file] = FileRecord(file.size, file.digest.hexdigest())

    def _flush(self, file: _ShardFile) -> None:
        """Runs on the flusher, beside the next shard."""
        with _reporting(self._directory / file.shard.file):
            os.fsync(file.handle.fileno())
            file.handle.close()

    def _finish(self) -> None:
        assert not self._todo, f"{self._todo[0][1].name} was not written"
        self._end_shard()
        for waiting in (self._hashes, self._flushes):
            while waiting:
                waiting.popleft().result()
        if len(self._shards) > 1:
            path = self._directory / INDEX_NAME
            with _reporting(path):
                path.write_text(shard_index(self._shards), encoding="utf-8")
                if self._kept:
                    self.records[INDEX_NAME] = hash_file(path)


@dataclass
class _ShardFile:
    shard: Shard
    handle: FileIO
    digest: hashlib._Hash
    size: int = 0
    sent: int = 0


def _send(handle: FileIO, begin: int, end: int) -> None:
    """Have the kernel begin to write part of a file, without waiting for the disk.

    That is what this advice does to pages that are not on the disk yet; it drops none of them.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)


def header_of(shard: Shard, metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and JSON of a shard's header, padded with spaces so that data starts 8-aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begin = 0
    for entry in shard.entries:
        end = begin + entry.nbytes
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def shard_index(shards: Sequence[Shard]) -> str:
    weight_map = {entry.name: shard.file for shard in shards for entry in shard.entries}
    total = sum(shard.nbytes for shard in shards)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2) + "\n"


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """OSError as one line about the file being written."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}).") from error


ItemT = TypeVar("ItemT")


@contextmanager
def ahead(items: Generator[ItemT], depth: int) -> Iterator[Iterator[ItemT]]:
    """Yield `items` in order, up to `depth` of them made before they are asked for.

    What making one raises is raised where it would have been taken. On exit, early or not, `items`
    is closed and its thread has ended.
    """
    # An item stands in a tuple of its own, None for the end.
    made: SimpleQueue[tuple[ItemT] | BaseException | None] = SimpleQueue()
    room = threading.Semaphore(depth)
    stopped = threading.Event()

    def make() -> None:
        try:
            with closing(items):
                for item in items:
                    room.acquire()
                    if stopped.is_set():
                        return
                    made.put((item,))
            made.put(None)
        except BaseException as error:
            made.put(error)

    def take() -> Iterator[ItemT]:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield item[0]

    thread = threading.Thread(target=make, name="spp-ahead")
    thread.start()
    try:
        yield take()
    finally:
        stopped.set()
        room.release()
        thread.join()
