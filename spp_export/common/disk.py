"""A hidden place beside an output, `.<name>.spp-<pid>-<random>`, where it grows until one rename.

A lock file in it is held for as long as its process lives, and the kernel lets go of it however
that ends. So what a killed process left behind is told from what another one is writing, also
where the pid has been given to someone else or belongs to another machine. The process itself
knows of its places before they exist, and removes them at the latest when it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spp_export.common.errors import OutputError
from spp_export.common.signals import Cleanup, held

_LOCK_NAME = "lock"
# An older output on its way out, where it cannot be swapped with the new one in one step.
ASIDE_NAME = "old"
_NEW_NAME = "new"
# A new directory is taken for a leftover only in the instant before its lock is held.
_ATTEMPTS = 100
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextmanager
def working_place(target: Path) -> Iterator[Path]:
    """Yield a new directory beside `target` for this process alone, removed afterwards.

    Raises OSError where it cannot be made.
    """
    place = _Place(target)
    try:
        place.take()
        yield place.path
    finally:
        place.removal.run()


@contextmanager
def scratch_folder(parent: Path | None = None, prefix: str = "spp-") -> Iterator[Path]:
    """Yield a new directory, below `parent` or where temporary files go, removed afterwards."""
    path = Path(parent or tempfile.gettempdir()) / f"{prefix}{secrets.token_hex(8)}"
    removal = Cleanup(lambda: shutil.rmtree(path, ignore_errors=True))
    try:
        path.mkdir(mode=0o700)
        yield path
    finally:
        removal.run()


def clear_leftovers(target: Path) -> None:
    """Remove the places of dead processes beside `target`; give back what one had put aside.

    On a file system without locks nothing can be told, and nothing is removed.
    """
    if not target.parent.is_dir():
        return
    for name in sorted(os.listdir(target.parent)):
        place = target.parent / name
        if is_place(name, target) and _is_mine(place):
            with contextlib.suppress(OSError):
                _clear(place, target)


def is_place(name: str, target: Path) -> bool:
    """Whether a directory's name is that of a working place of `target`."""
    pattern = rf"\.{re.escape(target.name)}\.spp-\d+-[0-9a-f]{{8}}"
    return re.fullmatch(pattern, name) is not None


def publish_file(target: Path, text: str, *, force: bool = False) -> None:
    """Write a text file that is there whole or not at all, flushed to disk.

    Raises OutputError where it exists (without `force`), is no regular file or cannot be written.
    """
    if os.path.lexists(target) and not os.path.isfile(target):
        raise OutputError(f"{target}: exists and is not a regular file. Choose another name.")
    target = Path(os.path.realpath(target))
    try:
        clear_leftovers(target)
        with working_place(target) as place:
            new = place / _NEW_NAME
            new.write_text(text, encoding="utf-8")
            sync(new)
            if force:
                os.replace(new, target)
            else:
                _link(new, target)
            sync(target.parent)
    except FileExistsError:
        raise file_exists(target) from None
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror}).") from error


def file_exists(target: Path) -> OutputError:
    """The error for a file that would be replaced without `--force`."""
    return OutputError(f"{target}: already exists. Choose another name or use --force.")


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, to disk."""
    folder = path.is_dir()
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECTORY if folder else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems write names at once and refuse to be asked.
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def free_space(path: Path) -> int:
    """Bytes free where `path` is or will be."""
    return shutil.disk_usage(nearest(path)).free


def nearest(path: Path) -> Path:
    """The path itself, or the closest folder above it that is there."""
    place = Path(os.path.realpath(path))
    while not os.path.exists(place):
        place = place.parent
    return place


class _Place:
    """A directory beside `target` with a lock in it; `removal` knows of it before it exists."""

    def __init__(self, target: Path) -> None:
        name = f".{target.name}.spp-{os.getpid()}-{secrets.token_hex(4)}"
        self.path = path = target.parent / name
        locks = self._locks = list[int]()

        def remove() -> None:
            shutil.rmtree(path, ignore_errors=True)
            while locks:
                os.close(locks.pop())

        self.removal = Cleanup(remove)

    def take(self) -> None:
        """Make and lock it. Raises OSError where it cannot be made."""
        with held():
            for _ in range(_ATTEMPTS):
                self.path.mkdir(exist_ok=True)  # and not mkdtemp, whose mode would ignore the umask
                try:
                    self._locks.append(_lock(self.path))
                    return
                except OSError as error:
                    if error.errno in _NO_LOCKS:
                        return
                    if error.errno not in (errno.ENOENT, errno.EWOULDBLOCK):
                        raise
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(self.path))


def _clear(place: Path, target: Path) -> None:
    with held():
        lock = _lock(place)  # fails while its process lives
        try:
            if os.path.lexists(place / ASIDE_NAME) and not os.path.lexists(target):
                (place / ASIDE_NAME).rename(target)
            shutil.rmtree(place, ignore_errors=True)
        finally:
            os.close(lock)


def _lock(place: Path) -> int:
    """The descriptor of a place's lock file, which is ours alone until it is closed. OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(place / _LOCK_NAME, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_mine(place: Path) -> bool:
    """A real directory of this user: in a folder that others write to, names prove nothing."""
    try:
        return place.is_dir() and not place.is_symlink() and place.stat().st_uid == os.geteuid()
    except OSError:
        return False


def _link(new: Path, target: Path) -> None:
    """Give a file its name, which must not exist yet."""
    try:
        os.link(new, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise FileExistsError from None
        os.replace(new, target)
