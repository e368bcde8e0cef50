"""Rows of CSV and Parquet files as records."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from spp_export.common.errors import ScenarioError
from spp_export.common.installation import install_command
from spp_export.data.records import COLUMNS, KEYS, unknown_keys

_DELIMITERS = ",;\t|"
# Rows of a Parquet file that are in memory together: a few bytes of it may stand for a long text.
_ROWS = 64


def csv_rows(text: str, label: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row by the names of the first one, in lower case, and where it is; cells that are empty
    are left out. What separates cells is what the first row has most of.

    Raises ScenarioError where no column is one that is read, or rows do not fit the first.
    """
    header = text.lstrip().partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header.count)
    before = csv.field_size_limit(len(text) + 1)
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = [name.strip().lower() for name in next((row for row in rows if row), [])]
        if not set(names) & set(KEYS):
            raise ScenarioError(f"{label}: the first line names the columns: {unknown_keys(names)}")
        for row in rows:
            where = f"{label}: line {rows.line_num}"
            if len(row) > len(names):
                raise ScenarioError(
                    f"{where}: has {len(row)} cells, and the first line {len(names)}. Put cells "
                    "with a comma in quotes."
                )
            if cells := {name: cell for name, cell in zip(names, row, strict=False) if cell}:
                yield where, cells
    except csv.Error as problem:
        raise ScenarioError(f"{label}: is not valid CSV ({problem}).") from None
    finally:
        csv.field_size_limit(before)


def parquet_rows(data: bytes, label: str, max_bytes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row, of the columns that are read, and where it is.

    Raises ScenarioError where pyarrow is missing, for what is no Parquet, has no column that is
    read, or holds more than `max_bytes` once it is unpacked.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise ScenarioError(
            f"{label}: Parquet is read with the package pyarrow. Run: "
            f"{install_command('pyarrow', extra=False)}, or write the file as .jsonl."
        ) from None
    number = size = 0
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(data))
        names = file.schema_arrow.names
        if not set(names) & set(KEYS):
            raise ScenarioError(f"{label}: {unknown_keys(names)}")
        columns = [name for name in names if name in COLUMNS]
        for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
            size += batch.nbytes
            if size > max_bytes:
                raise ScenarioError(
                    f"{label}: holds more than {max_bytes >> 20} MiB, the most that is read. Take "
                    "a sample of it."
                )
            for row in batch.to_pylist():
                number += 1
                yield f"{label}: row {number}", row
    except (pyarrow.ArrowException, OSError) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise ScenarioError(f"{label}: is not valid Parquet ({reason:.120}).") from None
