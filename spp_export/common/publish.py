"""Publishes a directory by one rename: there is none, or the old one, or a whole new one."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spp_export.common.disk import (
    ASIDE_NAME,
    clear_leftovers,
    free_space,
    is_place,
    sync,
    working_place,
)
from spp_export.common.errors import OutputError, SppError
from spp_export.common.manifest import wrote
from spp_export.common.signals import Cleanup

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Others that may put something in place between a look at it and a rename.
_ATTEMPTS = 100


@contextmanager
def publish(target: Path, force: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` on a clean exit, flushed to disk.

    `target` may be missing or empty; with `force` also a directory with our manifest, which is
    replaced. Missing parents are created. After an exception before the rename, KeyboardInterrupt
    included, the directory is gone and `target` is as it was; the rename itself is one step, and
    what comes after it finds the new output in place.

    Raises OutputError before any work where `target` cannot be published to, and for any failure
    to write, in the body as well.
    """
    target = Path(os.path.realpath(target))
    check_target(target, force)
    with _reporting(target), _parents_of(target), working_place(target) as place:
        work = place / "new"
        work.mkdir()
        try:
            yield work
        except SppError as error:
            if str(work) not in str(error):
                raise
            # Of the place that users know, and not of one that will be gone.
            raise type(error)(str(error).replace(str(work), str(target))) from error
        _flush(work)
        _check(target, force)
        _move_into_place(work, target, place / ASIDE_NAME, force)
        _confirm(target)


def require_free_space(path: Path, count: int) -> None:
    """Raise OutputError unless the file system that `path` is or will be on has `count` bytes."""
    free = free_space(path)
    if free < count:
        raise OutputError(
            f"{path}: needs {count / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. "
            "Make room or choose another disk."
        )


def check_target(target: Path, force: bool) -> None:
    """Raise OutputError where `publish` would refuse `target`, before any work is done.

    What killed processes left beside it is removed first, and takes no space from what follows.
    """
    target = Path(os.path.realpath(target))
    with _reporting(target):
        clear_leftovers(target)
        _check(target, force)


def _check(target: Path, force: bool) -> None:
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
        raise _not_empty(target)
    if not wrote(target):
        raise OutputError(
            f"{target}: has no manifest.json of spp, and --force replaces only what spp wrote. "
            "Choose another directory, or remove this one yourself."
        )


def _not_empty(target: Path) -> OutputError:
    return OutputError(f"{target}: is not empty. Choose another directory, or use --force.")


@contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Create the missing parents, and take them away again if there is nothing to put there."""
    missing = [folder for folder in target.parents if not folder.exists()]

    def remove() -> bool:
        if os.path.lexists(target):
            return True
        for folder in missing:
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError:  # something is in it, perhaps what is about to be removed
                return False
        return True

    removal = Cleanup(remove)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync(folder.parent)
        yield
        removal.cancel()
    except BaseException:
        removal.run()
        raise


def _flush(directory: Path) -> None:
    """Force every file and then every directory to disk."""
    for root, _, files in os.walk(directory, topdown=False):
        for name in files:
            sync(Path(root, name))
        sync(Path(root))


def _move_into_place(work: Path, target: Path, aside: Path, force: bool) -> None:
    """Put `work` at `target`; with `force` what was there is then below `work` or gone."""
    for _ in range(_ATTEMPTS):
        if force and target.exists() and any(target.iterdir()):
            if not _exchange(work, target):
                _swap_by_renames(work, target, aside)
            return
        try:
            work.rename(target)  # which the kernel refuses where something is in it by now
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if not force:
            break
        _check(target, force)  # another one was faster, and may be ours to replace or not
    raise _not_empty(target)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one step (Linux renameat2); False where that is not supported."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _swap_by_renames(work: Path, target: Path, aside: Path) -> None:
    """Swap in two steps. Should we die between them, the next run gives the old one back."""
    try:
        target.rename(aside)
        work.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise


def _confirm(target: Path) -> None:
    """Force the rename itself to disk."""
    try:
        sync(target.parent)
    except OSError as error:
        raise OutputError(
            f"{target}: is in place and whole, but the disk does not confirm it "
            f"({error.strerror}). Check the disk."
        ) from error


@contextmanager
def _reporting(target: Path) -> Iterator[None]:
    """OSError as one line about the output, unless it names another file.

    Libraries derive errors from OSError that no system call made; those have no number.
    """
    try:
        yield
    except OSError as error:
        name = error.filename
        if error.errno is None or (name is not None and not _concerns(Path(str(name)), target)):
            raise
        raise OutputError(f"{target}: cannot be written ({error.strerror}).") from error


def _concerns(path: Path, target: Path) -> bool:
    """Whether a path is that of an output, of a folder it is in, or in its working place."""
    places = (is_place(folder.name, target) for folder in (path, *path.parents))
    return path in (target, *target.parents) or any(places)
