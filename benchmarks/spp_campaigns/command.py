"""What the campaigns' command lines have in common."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spp_bench.provenance import versions
from spp_export.common.disk import publish_file
from spp_export.common.json_files import dump_json
from spp_export.common.versions import cpu_name
from spp_export.models.hub import cache_directory


def parser(description: str | None, *, writes: bool = False) -> argparse.ArgumentParser:
    """A parser with `--json`, and with `--dir` for a campaign that writes models."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=Path, help="file to write")
    if writes:
        made.add_argument("--dir", type=Path, help="where temporary models are written")
    return made


@contextmanager
def scratch(options: argparse.Namespace) -> Iterator[Path]:
    """A temporary directory in `--dir`."""
    with TemporaryDirectory(prefix="spp-", dir=options.dir) as directory:
        yield Path(directory)


@contextmanager
def empty_cache(directory: Path) -> Iterator[dict[str, str]]:
    """The environment of a run with nothing in its cache, a new `directory`, but the default model;
    the cache is gone afterwards."""
    directory.mkdir()
    (directory / "models").symlink_to(cache_directory() / "models")
    try:
        yield {**os.environ, "SPP_CACHE": str(directory)}
    finally:
        shutil.rmtree(directory)


def finish(options: argparse.Namespace, document: Mapping[str, Any], *lines: str) -> None:
    """Print what was measured, and write the document to the file of `--json`."""
    print("\n".join(lines))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        publish_file(options.json, dump_json(document), force=True)


def machine(*also: str) -> dict[str, Any]:
    """Processor, cores and library versions, including those of the packages in `also`."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), **versions(*also)}


def words(values: Mapping[str, Any]) -> str:
    """Names and values in one line."""
    return " ".join(f"{name}: {value}" for name, value in values.items())


def table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows in columns, the first one aligned to the left. columns: for every title, the format of
    its cells, over the fields of a row; a cell is empty where the row has no such field."""
    lines = [list(columns), *([_cell(form, row) for form in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip()
        for cells in lines
    )


def _cell(form: str, row: Mapping[str, Any]) -> str:
    try:
        return form.format_map(row)
    except KeyError:
        return ""
