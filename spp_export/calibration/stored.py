"""What the user's cache holds, how much it may hold, and what is in use by somebody.

A file in use has a shared lock on it, which the kernel lets go of however its process ends; what
nobody holds may be removed, least recently used first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spp_export.common.errors import UsageError
from spp_export.common.options import parse_count
from spp_export.models.hub import DEMO_NAME, cache_directory, cached_name

LIMIT_VARIABLE = "SPP_CACHE_LIMIT"
DEFAULT_LIMIT = 50_000_000_000
STATISTICS, RECOVERIES, ANSWERS, MODELS = "statistics", "recoveries", "answers", "models"
# Of a safetensors header, which names the model.
_LONGEST_HEADER = 1 << 20
_log = logging.getLogger(__name__)
_KEPT: ContextVar[list[Path] | None] = ContextVar("kept", default=None)


@dataclass(frozen=True)
class CachedFile:
    """A file of the cache, or the directory of a model.

    kind   "statistics", "recoveries", "answers" or "models"
    model  the model that it is of; "" where it does not say
    used   when it was last used, in seconds since 1970
    """

    path: Path
    kind: str
    model: str
    nbytes: int
    used: float

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "model": self.model,
            "bytes": self.nbytes,
            "used": round(self.used),
        }


@dataclass(frozen=True)
class Kept:
    """What a command left in the cache for the next one: sizes by file."""

    files: dict[Path, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"directory": str(cache_directory()), "files": len(self.files), "bytes": self.nbytes}


def cached_files() -> list[CachedFile]:
    """Everything in the cache, least recently used first."""
    root = cache_directory()
    files = []
    for kind in (STATISTICS, RECOVERIES, ANSWERS, MODELS):
        for path in sorted(root.glob(f"{kind}/[!.]*")):
            with contextlib.suppress(FileNotFoundError):
                if kind == MODELS and path.is_dir():
                    files.append(_model(path))
                elif path.suffix == ".safetensors":
                    status = path.stat()
                    name = _model_of(path)
                    files.append(CachedFile(path, kind, name, status.st_size, status.st_mtime))
    return sorted(files, key=lambda file: (file.used, file.path))


def _model(path: Path) -> CachedFile:
    sizes = [file.stat() for file in path.rglob("*") if file.is_file()]
    used = max(status.st_mtime for status in (*sizes, path.stat()))
    name = cached_name(path.resolve()) or DEMO_NAME
    return CachedFile(path, MODELS, name, sum(s.st_size for s in sizes), used)


def _model_of(path: Path) -> str:
    """What a file of statistics says of its model."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        data = file.read(min(length, _LONGEST_HEADER))
    try:
        name = json.loads(data)["__metadata__"]["model"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return name if isinstance(name, str) else ""


def cache_limit() -> int:
    """Bytes that statistics and states of training may take. Raises UsageError."""
    text = os.environ.get(LIMIT_VARIABLE)
    if not text:
        return DEFAULT_LIMIT
    try:
        return parse_count(text)
    except ValueError as error:
        raise UsageError(f"{LIMIT_VARIABLE}: {error}.") from error


def hold(path: Path) -> int | None:
    """A descriptor that keeps a file from being removed until it is closed; None where there is no
    such file any more. Holding it is using it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # not every file system has locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    with contextlib.suppress(OSError):
        os.utime(path)
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return descriptor
    os.close(descriptor)
    return None


def hold_for(owner: object, path: Path) -> bool:
    """`hold` for as long as `owner` lives; False where there is no such file."""
    descriptor = hold(path)
    if descriptor is None:
        return False
    weakref.finalize(owner, os.close, descriptor)
    return True


def remove(file: CachedFile) -> bool:
    """Remove a file that nobody holds; False where somebody does. Models are not locked."""
    if file.kind == MODELS:
        shutil.rmtree(file.path, ignore_errors=True)
        return not file.path.exists()
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return error.errno == errno.ENOENT
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.path.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def trim() -> list[CachedFile]:
    """Keep the limit: remove what was used longest ago, and nothing that is in use."""
    limit = cache_limit()
    files = [file for file in cached_files() if file.kind != MODELS]
    total = sum(file.nbytes for file in files)
    removed = []
    for file in files:
        if total <= limit:
            break
        if remove(file):
            total -= file.nbytes
            removed.append(file)
    if total > limit:
        _log.warning(
            "%s: holds %.1f GB, %s allows %.1f GB, and all of it is in use.",
            cache_directory(),
            total / 1e9,
            LIMIT_VARIABLE,
            limit / 1e9,
        )
    return removed


@contextmanager
def noting() -> Iterator[Kept]:
    """What is written to the cache inside, known once it ends."""
    paths: list[Path] = []
    kept, token = Kept(), _KEPT.set(paths)
    try:
        yield kept
    finally:
        _KEPT.reset(token)
        for path in paths:
            with contextlib.suppress(OSError):
                kept.files[path] = path.stat().st_size


def note(path: Path) -> None:
    """Tell `noting` of a file that was written."""
    paths = _KEPT.get()
    if paths is not None:
        paths.append(path)
