"""Publishes a directory by one rename: there is none, or the old one, or a whole new one.

Work happens in a hidden sibling `.<name>.spp-<pid>-<random>`, locked for as long as its process
lives, so that what a killed process left behind is told from what another one is writing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spp_export.checkpoint.manifest import wrote
from spp_export.errors import OutputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def publish(target: Path, force: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` on a clean exit, flushed to disk.

    `target` may be missing or empty; with `force` also a directory with our manifest, which is
    replaced. Missing parents are created. After an exception, KeyboardInterrupt included, the
    directory is gone and `target` is as it was. Raises OutputError before any work where `target`
    cannot be published to, and after it where the disk fails.
    """
    target = Path(os.path.realpath(target))
    with _reporting(target):
        _clear_leftovers(target)
        check_target(target, force)
    with _parents_of(target), _working_directory(target) as work:
        yield work
        with _reporting(target):
            _flush(work)
            check_target(target, force)
            _move_into_place(work, target)


def require_free_space(path: Path, count: int) -> None:
    """Raise OutputError unless the file system that `path` is or will be on has `count` bytes."""
    place = Path(os.path.realpath(path))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < count:
        raise OutputError(
            f"{path}: needs {count / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. "
            "Make room or choose another disk."
        )


def check_target(target: Path, force: bool) -> None:
    """Raise OutputError where `publish` would refuse `target`, before any work is done."""
    if os.path.ismount(target) or target == Path.cwd():
        what = "the current directory" if target == Path.cwd() else "a mount point"
        raise OutputError(
            f"{target}: is {what}, which cannot be replaced by a rename. Name a directory in it."
        )
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target}: exists and is not a directory. Choose another name.")
    if not any(target.iterdir()):
        return
    if not force:
        raise OutputError(f"{target}: is not empty. Choose another directory, or use --force.")
    if not wrote(target):
        raise OutputError(
            f"{target}: has no manifest.json of spp, and --force replaces only what spp wrote. "
            "Choose another directory, or remove this one yourself."
        )


@contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Create the missing parents, and take them away again if there is nothing to put there."""
    missing = [folder for folder in target.parents if not folder.exists()]
    with _reporting(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


@contextmanager
def _working_directory(target: Path) -> Iterator[Path]:
    work = _sibling(target, "")
    with _reporting(target):
        work.mkdir()  # and not mkdtemp, whose mode would ignore the umask
        descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no such locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield work
    finally:
        # What was begun, or after an exchange what was there before.
        shutil.rmtree(work, ignore_errors=True)
        os.close(descriptor)


def _sibling(target: Path, mark: str) -> Path:
    return target.parent / f".{target.name}.spp-{mark}{os.getpid()}-{secrets.token_hex(4)}"


def _clear_leftovers(target: Path) -> None:
    """Remove siblings whose process died; give back an old target that one had put aside."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.spp-(old-)?(\d+)-[0-9a-f]{{8}}")
    if not target.parent.is_dir():
        return
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if not match or not _abandoned(path, int(match[2])):
            continue
        if match[1] and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _abandoned(path: Path, pid: int) -> bool:
    """Whether no process works in a directory: neither by its pid, nor by its lock, which also
    tells for other machines and containers."""
    if pid != os.getpid() and _alive(pid):
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _flush(directory: Path) -> None:
    """Force every file and then every directory to disk."""
    for root, _, files in os.walk(directory, topdown=False):
        for name in files:
            _sync(os.path.join(root, name), os.O_RDONLY | os.O_NOFOLLOW)
        _sync(root, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: str | Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(work: Path, target: Path) -> None:
    occupied = target.exists() and any(target.iterdir())
    if not occupied:
        work.rename(target)
    elif not _exchange(work, target):
        _swap_by_renames(work, target)
    _sync(target.parent, os.O_RDONLY | os.O_DIRECTORY)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step (Linux renameat2); False where that is not supported."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _swap_by_renames(work: Path, target: Path) -> None:
    """Swap in two steps. Should we die between them, the next `publish` gives the old one back."""
    aside = _sibling(target, "old-")
    try:
        target.rename(aside)
        work.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _reporting(target: Path) -> Iterator[None]:
    """OSError as one line about the output."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror}).") from error
