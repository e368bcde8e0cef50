"""Runs `spp` in forked children of a process that has imported everything, with faults inside.

A child starts in milliseconds. Its faults come at steps: the events that Python audits (opening,
making, renaming and removing files) about one folder, in their order, which is the same every run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from spp_cli.main import main

NOBODY = 65534
READING = "open-to-read"
_STEPS = ("open", "ctypes.dlsym")
_STEP_MODULES = ("os.", "shutil.")


@dataclass(frozen=True)
class Faults:
    """What goes wrong in a child.

    step: at which event, counted from 1 on; None for never; -1 counts them into `counted`
    signals: sent to itself at that step, each a moment after the one before
    error: raised as OSError at that step
    fsync_fails: number of the flush from which on each one fails with `error`
    largest_file: bytes that a file may have
    user: who the child is
    swap: whether the kernel can exchange two directories
    stdout: whether somebody reads it
    """

    step: int | None = None
    signals: tuple[int, ...] = ()
    error: int | None = None
    fsync_fails: int | None = None
    largest_file: int | None = None
    user: int | None = None
    swap: bool = True
    stdout: bool = True


@dataclass(frozen=True)
class Ended:
    """How a child ended: its status as `subprocess` has it, what it said, its steps if counted."""

    status: int
    out: str
    err: str
    steps: tuple[str, ...] = ()


@dataclass
class Child:
    """A running child."""

    pid: int
    streams: Sequence[int]
    record: int
    started: float = field(default_factory=time.monotonic)

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Wait for its end."""
        _, status = os.waitpid(self.pid, 0)
        said = [_content(stream) for stream in (*self.streams, self.record)]
        return Ended(os.waitstatus_to_exitcode(status), said[0], said[1], tuple(said[2].split()))


def start(
    arguments: Sequence[str | Path],
    folder: Path,
    faults: Faults = Faults(),
) -> Child:
    """Begin a command whose steps are those about `folder`; returns once its process is up."""
    streams = [_unnamed() for _ in range(3)]
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            _run([str(item) for item in arguments], folder, faults, streams, writing)
        os._exit(99)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return Child(pid, streams[:2], streams[2])


def run(
    arguments: Sequence[str | Path],
    folder: Path,
    faults: Faults = Faults(),
) -> Ended:
    """A command from its beginning to its end."""
    return start(arguments, folder, faults).wait()


def steps(arguments: Sequence[str | Path], folder: Path, faults: Faults) -> tuple[str, ...]:
    """The names of all steps of a command that nothing disturbs."""
    ended = run(arguments, folder, replace(faults, step=-1))
    assert ended.status == 0, ended.err
    return ended.steps


def _run(
    arguments: list[str], folder: Path, faults: Faults, streams: Sequence[int], ready: int
) -> None:
    os.dup2(streams[0] if faults.stdout else _closed_pipe(), 1)
    os.dup2(streams[1], 2)
    # Those of the parent believe to be on other kinds of file.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    if faults.user is not None:
        os.setgroups([])
        os.setgid(faults.user)
        os.setuid(faults.user)
    if faults.largest_file is not None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (faults.largest_file, hard))
    if not faults.swap:
        _without_renameat2()
    if faults.fsync_fails is not None:
        _failing_fsync(faults.fsync_fails, faults.error or 0)
    if faults.step is not None:
        sys.addaudithook(_trap(folder, faults, streams[2]))
    sys.argv = ["spp", *arguments]
    os.write(ready, b"1")
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 98)


def _trap(folder: Path, faults: Faults, record: int) -> Callable[[str, tuple[object, ...]], None]:
    """An audit hook that counts steps and does at one of them what the faults say."""
    prefix, count, busy = str(folder), 0, False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count, busy
        if busy or not (event in _STEPS or event.startswith(_STEP_MODULES)):
            return
        if event == "ctypes.dlsym":
            if "renameat2" not in arguments:
                return
        elif not any(_text(item).startswith(prefix) for item in arguments[:2]):
            return
        busy = True
        count += 1
        if faults.step == -1:
            os.write(record, f"{_label(event, arguments)}\n".encode())
        elif count == faults.step:
            for number in faults.signals:
                os.kill(os.getpid(), number)
            if faults.error is not None:
                raise OSError(faults.error, os.strerror(faults.error))
        busy = False

    return hook


def _label(event: str, arguments: tuple[object, ...]) -> str:
    flags = arguments[2] if event == "open" else None
    return READING if isinstance(flags, int) and flags & os.O_ACCMODE == os.O_RDONLY else event


def _text(item: object) -> str:
    return os.fsdecode(item) if isinstance(item, str | bytes | os.PathLike) else ""


def _without_renameat2() -> None:
    class Old(ctypes.CDLL):
        def __getattr__(self, name: str) -> object:
            if name == "renameat2":
                raise AttributeError(name)
            return super().__getattr__(name)

    ctypes.CDLL = Old  # type: ignore[misc]


def _failing_fsync(first: int, error: int) -> None:
    fsync, count = os.fsync, 0

    def fail(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count >= first:
            raise OSError(error, os.strerror(error))
        fsync(descriptor)

    os.fsync = fail  # type: ignore[assignment]


def _closed_pipe() -> int:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def _unnamed() -> int:
    """A file that has no name, and that the child's end does not take away."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _content(descriptor: int) -> str:
    with os.fdopen(descriptor, "rb") as file:
        file.seek(0)
        return file.read().decode()
