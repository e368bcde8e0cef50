"""manifest.json: size and SHA-256 of every file of an output, and the mark that we wrote it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from spp_export.common.disk import sync
from spp_export.common.documents import Document, validated
from spp_export.common.errors import CheckpointError, OutputError
from spp_export.common.json_files import MAX_JSON_BYTES, dump_json, parse_json, read_bytes, shown

_PLAN = "plan.json"
MANIFEST_NAME = "manifest.json"
_TOOL = "spp"
_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of a file."""

    size: int
    sha256: str


class _FileDocument(Document):
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _ManifestDocument(Document):
    version = _SCHEMA_VERSION, f"Use the version of {_TOOL} that wrote it."

    tool: str
    schema_version: int
    files: dict[str, Any]


def hash_file(path: Path) -> FileRecord:
    """Size and hash of a file's content."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return FileRecord(handle.tell(), digest)


def write_manifest(directory: Path, known: Mapping[str, FileRecord] | None = None) -> None:
    """Write manifest.json over every other file of `directory`, the last file to be written.

    `known` has records that were made while writing, by relative name; those files are not read
    again. The others are flushed to disk while they are hashed. Raises OutputError where a file
    cannot be read or flushed, and for what is neither a file nor a directory with files in it.
    """
    known = known or {}
    records: dict[str, FileRecord] = {}
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="spp-flush") as flusher:
            flushed = []
            for name in _names(directory):
                path = directory / name
                if path.is_symlink() or not path.is_file():
                    raise OutputError(f"{path}: only regular files belong in an output. Remove it.")
                if not (record := known.get(name)):
                    flushed.append(flusher.submit(sync, path))
                    record = hash_file(path)
                assert record.size == path.stat().st_size, f"{name}: changed after it was hashed"
                records[name] = record
            for one in flushed:
                one.result()
        (directory / MANIFEST_NAME).write_text(_text(records), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{directory}: cannot write {MANIFEST_NAME} ({error.strerror})."
        ) from error


def check_manifest(directory: Path) -> list[str]:
    """What is wrong with a directory's files, one line each; empty when all is as written.

    No byte of it can change unnoticed: every file is hashed, and the manifest itself must be the
    text that `write_manifest` gives for what it says. Modes and times do not count.
    """
    try:
        listed = _listed(directory)
        present = set(_names(directory))
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        return [f"{error.filename}: cannot be read ({error.strerror})"]
    problems = [f"{name}: missing" for name in sorted(listed.keys() - present)]
    problems += [f"{name}: not in the manifest" for name in sorted(present - listed.keys())]
    for name in sorted(present & listed.keys()):
        problem = _compare(directory / name, listed[name])
        problems += [f"{name}: {problem}"] if problem else []
    return problems


def wrote(directory: Path) -> bool:
    """Whether a directory carries our manifest, of whatever version: it is ours to replace."""
    try:
        _read(directory)
    except CheckpointError:
        return False
    return True


def require_export(directory: Path) -> None:
    """OutputError, which says what is there instead, unless a directory is or was an export."""
    if not directory.exists():
        raise OutputError(
            f"{directory}: no such directory. Give one that 'spp export' or 'spp convert' wrote."
        )
    if not directory.is_dir():
        raise OutputError(
            f"{directory}: expected a directory that 'spp export' or 'spp convert' wrote, got a "
            "file."
        )
    if not (directory / _PLAN).is_file() and _PLAN not in listed_names(directory):
        raise OutputError(f"{directory}: no {_PLAN}, so not an export of spp.")


def listed_names(directory: Path) -> frozenset[str]:
    """The files that a directory should have by its manifest; none without a readable one."""
    try:
        return frozenset(_listed(directory))
    except CheckpointError:
        return frozenset()


def _text(records: Mapping[str, FileRecord]) -> str:
    """The one text that says this."""
    files = {
        name: {"bytes": record.size, "sha256": record.sha256}
        for name, record in sorted(records.items())
    }
    return dump_json({"tool": _TOOL, "schema_version": _SCHEMA_VERSION, "files": files})


def _read(directory: Path) -> tuple[bytes, dict[str, Any]]:
    """The manifest's bytes, and the object in them."""
    path = directory / MANIFEST_NAME
    if path.is_symlink():
        raise CheckpointError(f"{path}: expected a regular file, got a link.")
    data = read_bytes(
        path, what="manifest", max_bytes=MAX_JSON_BYTES, error=CheckpointError, pipe=False
    )
    content = parse_json(data, what=f"manifest {path}", error=CheckpointError)
    if not isinstance(content, dict) or content.get("tool") != _TOOL:
        raise CheckpointError(f"{path}: was not written by {_TOOL}.")
    return data, content


def _listed(directory: Path) -> dict[str, FileRecord]:
    """What the manifest says. Raises CheckpointError unless it is as `write_manifest` writes it."""
    path = directory / MANIFEST_NAME
    data, content = _read(directory)
    document = validated(_ManifestDocument, content, what=str(path), error=CheckpointError)
    records = {}
    for name, entry in document.files.items():  # one by one, so that the first bad one ends it
        place = f"{path}: {shown(name)}"
        record = validated(_FileDocument, entry, what=place, error=CheckpointError)
        records[name] = FileRecord(record.bytes, record.sha256)
    if data != _text(records).encode():
        raise CheckpointError(
            f"{path}: has other spaces, another order or another spelling than {_TOOL} writes, "
            "so it was changed. Write the directory again."
        )
    return records


def _names(directory: Path) -> Iterator[str]:
    """Relative names of everything but directories, without following links; a directory that
    holds nothing is named too, with a slash at the end. Raises OSError."""

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(directory, onerror=refuse):
        place = Path(root).relative_to(directory)
        if not folders and not files:
            yield f"{place.as_posix()}/"
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in [*files, *links]:
            if (relative := (place / name).as_posix()) != MANIFEST_NAME:
                yield relative


def _compare(path: Path, expected: FileRecord) -> str | None:
    if path.is_symlink() or not path.is_file():
        return "is not a regular file"
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"has {size} bytes, the manifest says {expected.size}"
        sha256 = hash_file(path).sha256
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if sha256 != expected.sha256:
        return f"its content has changed, SHA-256 {sha256}, the manifest says {expected.sha256}"
    return None
