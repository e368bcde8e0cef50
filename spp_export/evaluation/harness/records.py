"""The results file: a header, then one record per line, each on the disk before the next begins."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from spp_export.common.documents import Document, Rows, explained, validated
from spp_export.common.errors import OutputError
from spp_export.common.json_files import decode_utf8, parse_json, read_bytes
from spp_export.evaluation.bootstrap import DocumentScores, scores_from_json
from spp_export.evaluation.harness.rows import Row

RESULTS = "results.jsonl"
SCHEMA_VERSION = 1
MAX_RESULTS_BYTES = 1 << 30
_WHAT = "evaluation results"
_ROW = TypeAdapter(Row)


_Numbers = Rows[float | None]
_Object = Annotated[dict[str, Any], Field(default_factory=dict)]


class _Text(Document):
    documents: int
    sha256: str
    tokens: dict[str, int] | None = None


class _Header(Document):
    model_config = ConfigDict(extra="ignore")
    version = SCHEMA_VERSION, "Run the evaluation again, into another directory."

    schema_version: int
    texts: dict[str, _Text]
    context: dict[str, Any]


class _Summary(Document):
    tokens: float | None
    perplexity: float | None
    ratio: _Numbers
    kl: _Numbers
    top1: _Numbers


class _Scores(Document):
    tokens: _Numbers = ()
    nll: _Numbers
    kl: _Numbers
    agreed: _Numbers
    summary: _Summary


class _GreedySummary(Document):
    prompts: int
    tokens: float
    agreed: _Numbers


class _Greedy(Document):
    tokens: _Numbers
    agreed: _Numbers
    summary: _GreedySummary


class _RecordDocument(Document):
    """A line of the results, after the header; the runner writes it."""

    key: str
    row: dict[str, Any]
    realised: _Object
    texts: Annotated[dict[str, _Scores], Field(default_factory=dict)]
    greedy: _Greedy | None = None
    answers: _Object
    seconds: float = 0
    error: str | None = None


@dataclass(frozen=True)
class Record:
    """One measured row: `realised`, `texts`, `greedy` and `answers` as the runner wrote them, or
    `error`."""

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
    def on_answers(self) -> bool:
        """Whether answers were judged, and not the text of prompts alone."""
        return bool(self.header["context"].get("number of answer tokens"))

    @property
    def tokens(self) -> dict[str, int]:
        """Predicted tokens of each text that any row was measured on."""
        summaries = {
            name: [record.data["texts"][name]["summary"].get("tokens") for record in self.measured]
            for name in self.texts
        }
        counts = {name: max(filter(None, of), default=0) for name, of in summaries.items()}
        return {name: int(count) for name, count in counts.items() if count}

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
            earlier = read_results(path)
            _check_context(earlier.header["context"], header["context"], path)
            records = {record.key: record for record in earlier.records}
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
    if not lines:
        raise OutputError(f"{label}: expected a header of 'spp eval' in the first line.")
    header, *values = [
        parse_json(line, what=f"{label}: line {number}", error=OutputError)
        for number, line in enumerate(lines, start=1)
    ]
    validated(_Header, header, what=f"{label}: line 1, the header", error=OutputError)
    records: dict[str, Record] = {}
    for number, value in enumerate(values, start=2):
        where = f"{label}: line {number}"
        document = validated(_RecordDocument, value, what=where, error=OutputError)
        records[document.key] = Record(document.key, _row(document.row, where), value)
    return Results(header, tuple(records.values()))


def _row(value: Mapping[str, Any], where: str) -> Row:
    try:
        return _ROW.validate_json(json.dumps(value))  # strict dataclasses are read from text only
    except ValidationError as problem:
        raise OutputError(f"{where}: row: {explained(problem)}.") from None


def _check_context(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
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
