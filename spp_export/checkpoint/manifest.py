"""manifest.json: size and SHA-256 of every file of an output, and the mark that we wrote it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_export.errors import CheckpointError, OutputError
from spp_export.jsonio import dump_json, read_json

MANIFEST_NAME = "manifest.json"
_TOOL = "spp"
_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of a file."""

    size: int
    sha256: str


def hash_file(path: Path) -> FileRecord:
    """Size and hash of a file's content."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return FileRecord(handle.tell(), digest)


def write_manifest(directory: Path, known: Mapping[str, FileRecord] | None = None) -> None:
    """Write manifest.json over every other file of `directory`, the last file to be written.

    `known` has records that were made while writing, by relative name; those files are not read
    again. Raises OutputError where a file cannot be read or is neither a file nor a directory.
    """
    records = dict(known or {})
    files: dict[str, dict[str, Any]] = {}
    try:
        for name in sorted(_names(directory)):
            path = directory / name
            if path.is_symlink() or not path.is_file():
                raise OutputError(f"{path}: only regular files belong in an output. Remove it.")
            record = records.get(name) or hash_file(path)
            assert record.size == path.stat().st_size, f"{name}: changed after it was hashed"
            files[name] = {"bytes": record.size, "sha256": record.sha256}
        content = {"tool": _TOOL, "schema_version": _SCHEMA_VERSION, "files": files}
        (directory / MANIFEST_NAME).write_text(dump_json(content), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{directory}: cannot write {MANIFEST_NAME} ({error.strerror})."
        ) from error


def check_manifest(directory: Path) -> list[str]:
    """What is wrong with a directory's files, one line each; empty when all is as written."""
    try:
        listed = _listed(directory)
    except CheckpointError as error:
        return [str(error)]
    present = set(_names(directory))
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


def _read(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST_NAME
    if path.is_symlink():
        raise CheckpointError(f"{path}: expected a regular file, got a link.")
    content = read_json(path, what="manifest", error=CheckpointError)
    if not isinstance(content, dict) or content.get("tool") != _TOOL:
        raise CheckpointError(f"{path}: was not written by {_TOOL}.")
    return content


def _listed(directory: Path) -> dict[str, Any]:
    content = _read(directory)
    version, files = content.get("schema_version"), content.get("files")
    if version != _SCHEMA_VERSION:
        raise CheckpointError(
            f"{directory / MANIFEST_NAME}: schema_version is {version!r:.40}, expected "
            f"{_SCHEMA_VERSION}. Use the version of {_TOOL} that wrote it."
        )
    if not isinstance(files, dict):
        raise CheckpointError(
            f"{directory / MANIFEST_NAME}: files must be an object. It is damaged."
        )
    return files


def _names(directory: Path) -> Iterator[str]:
    """Relative names of everything but directories, without following links."""
    for root, folders, files in os.walk(directory):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in [*files, *links]:
            relative = Path(root, name).relative_to(directory).as_posix()
            if relative != MANIFEST_NAME:
                yield relative


def _compare(path: Path, expected: Any) -> str | None:
    if path.is_symlink() or not path.is_file():
        return "is not a regular file"
    if not isinstance(expected, dict):
        return "its entry in the manifest is damaged"
    try:
        size = path.stat().st_size
        if size != expected.get("bytes"):
            return f"has {size} bytes, the manifest says {expected.get('bytes')!r:.40}"
        changed = hash_file(path).sha256 != expected.get("sha256")
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "its content has changed" if changed else None
