"""The results file: a header, then one record per line, each on the disk before the next begins."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_export.common.errors import OutputError
from spp_export.common.json_files import decode_utf8, parse_json, read_bytes
from spp_export.evaluation.harness.documents import DocumentScores, scores_from_json
from spp_export.evaluation.harness.rows import Row

RESULTS = "results.jsonl"
SCHEMA_VERSION = 1
MAX_RESULTS_BYTES = 1 << 30
_WHAT = "evaluation results"


@dataclass(frozen=True)
class Record:
    """One measured row: `realised`, `texts` and `answers` as the runner wrote them, or `error`."""

    key: str
    row: Row
    data: Mapping[str, Any]

    @property
    def error(self) -> str | None:
        """Why the row has no figures."""
        error: str | None = self.data.get("error")
        return error


@dataclass(frozen=True)
class Results:
    """A results file as read: of rows written twice, the last."""

    header: Mapping[str, Any]
    records: tuple[Record, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the texts, in the order of the evaluation."""
        return tuple(self.header["texts"])

    @property
    def judge(self) -> str:
        """The text that ranks: that of most documents, whose intervals are narrowest."""
        return max(self.texts, key=lambda name: int(self.header["texts"][name]["documents"]))

    @property
    def measured(self) -> tuple[Record, ...]:
        """Records with figures."""
        return tuple(record for record in self.records if record.error is None)

    @property
    def failed(self) -> tuple[Record, ...]:
        """Records of rows that could not be planned."""
        return tuple(record for record in self.records if record.error is not None)

    def scores(self, record: Record, text: str) -> DocumentScores:
        """A row's scores per document of a text."""
        return scores_from_json(self._dense.data["texts"][text], record.data["texts"][text])

    @property
    def _dense(self) -> Record:
        try:
            return next(record for record in self.measured if record.row.kind == "dense")
        except StopIteration:
            raise OutputError(f"{_WHAT}: hold no dense row. Run the evaluation again.") from None


class RecordFile:
    """A results file open for appending; see `open_records`."""

    def __init__(self, descriptor: int, records: Mapping[str, Record]) -> None:
        self._descriptor = descriptor
        self.done = {key for key, record in records.items() if record.error is None}

    def append(self, key: str, row: Row, data: Mapping[str, Any]) -> None:
        """Write a record and wait until the disk has it."""
        _append(self._descriptor, {"key": key, "row": row.to_dict(), **data})
        if "error" not in data:
            self.done.add(key)


@contextmanager
def open_records(path: Path, header: Mapping[str, Any]) -> Iterator[RecordFile]:
    """Continue the results in `path`, or begin them with `header`.

    A torn last line, which is all that a crash can leave, is dropped. Raises OutputError where the
    file belongs to another evaluation (its `context` differs), another process is writing it, or
    it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as problem:
        raise OutputError(f"{path}: cannot be written ({problem.strerror}).") from None
    try:
        _lock(descriptor, path)
        _drop_torn_line(descriptor)
        records: dict[str, Record] = {}
        if os.fstat(descriptor).st_size == 0:
            _append(descriptor, header)
        else:
            found = read_results(path)
            _check_context(found.header, header, path)
            records = {record.key: record for record in found.records}
        yield RecordFile(descriptor, records)
    finally:
        os.close(descriptor)


def read_results(path: str | os.PathLike[str]) -> Results:
    """The results in a file; OutputError names the line that is wrong."""
    data = read_bytes(path, what=_WHAT, max_bytes=MAX_RESULTS_BYTES, error=OutputError)
    label = f"{_WHAT} {os.fspath(path)}"
    text = decode_utf8(data, what=label, error=OutputError)
    # A line without its end is still being written, or never will be.
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    values = [
        parse_json(line, what=f"{label}: line {number}", error=OutputError)
        for number, line in enumerate(lines, start=1)
    ]
    if not values or not isinstance(values[0], dict) or "context" not in values[0]:
        raise OutputError(f"{label}: expected a header of 'spp eval' in the first line.")
    if values[0].get("schema_version") != SCHEMA_VERSION:
        version = values[0].get("schema_version")
        raise OutputError(f"{label}: schema_version is {version!r}, expected {SCHEMA_VERSION}.")
    records: dict[str, Record] = {}
    for number, value in enumerate(values[1:], start=2):
        record = _record(value, f"{label}: line {number}")
        records[record.key] = record
    return Results(values[0], tuple(records.values()))


def _record(value: Any, where: str) -> Record:
    try:
        return Record(value["key"], Row(**value["row"]), value)
    except (KeyError, TypeError):
        raise OutputError(f"{where}: expected a record with 'key' and 'row'.") from None


def _check_context(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    before, now = found["context"], wanted["context"]
    different = sorted(name for name in before.keys() | now if before.get(name) != now.get(name))
    if different:
        raise OutputError(
            f"{path}: holds another evaluation, with a different {' and '.join(different)}. "
            "Choose another directory, or replace it with --force."
        )


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise OutputError(f"{path}: another evaluation is writing to it.") from None


def _drop_torn_line(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    data = os.pread(descriptor, size, 0)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), len(data))):
        data += more
    whole = data.rfind(b"\n") + 1
    if whole < size:
        os.ftruncate(descriptor, whole)


def _append(descriptor: int, value: Mapping[str, Any]) -> None:
    line = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")) + "\n"
    data = line.encode()
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)
