"""Exports whose disk, permissions, neighbours or source are not as they should be."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

from tally import Tally, one_line, succeeded
from workbench import FORMATS, NEW_KEEP, OLD_KEEP, Workbench, promise
from zygote import NOBODY, Ended, Faults, run, start

_TAKING_SPACE = ("open", "os.mkdir", "os.rename", "shutil.copyfile")
# Steps up to which a source is still being read, more or less.
_EARLY = 25
_NO_SPACE = "No space left on device"


def failing_calls(bench: Workbench, tally: Tally, rng: random.Random, count: int) -> None:
    """A call that opens, makes or renames a file fails, and every flush from some one on."""
    every = list(product(FORMATS, (False, True), (errno.ENOSPC, errno.EIO), ("step", "flush")))
    rng.shuffle(every)
    for index in range(count):
        form, older, error, kind = every[index % len(every)]
        names = bench.count_steps(form, older)
        # A full disk can be read.
        some = [i for i, n in enumerate(names, 1) if error != errno.ENOSPC or n in _TAKING_SPACE]
        step = rng.choice(some) if kind == "step" else None
        flush = rng.randint(1, 12) if kind == "flush" else None
        faults = Faults(step=step, error=error, fsync_fails=flush)
        name = f"{errno.errorcode[error]} in {'a call' if kind == 'step' else 'flushes'}"
        facts = {"form": form, "step": step, "event": step and names[step - 1], "flush": flush}
        reason = _NO_SPACE if error == errno.ENOSPC else ""
        _failing(bench, tally, name, facts, form, older, faults, reason)


def limited_files(bench: Workbench, tally: Tally, rng: random.Random, count: int) -> None:
    """Whichever library writes it, a file cannot grow beyond some size."""
    for index in range(count):
        form, older = FORMATS[index % 2], index // 2 % 2 == 0
        files = (path.stat().st_size for path in bench.reference(form, NEW_KEEP).iterdir())
        limit = rng.randrange(max(files))
        faults = Faults(largest_file=limit)
        facts = {"form": form, "limit": limit}
        _failing(bench, tally, "EFBIG in writes", facts, form, older, faults, "")


def full_disk(bench: Workbench, tally: Tally, rng: random.Random, count: int) -> None:
    """A small tmpfs which is too small from the first, or fills up at some moment."""
    for index in range(count):
        form, older = FORMATS[index % 2], index // 2 % 2 == 0
        with bench.folder() as folder, _tmpfs(folder, "16m") as reason:
            if reason:
                tally.skip("disk full (tmpfs)", reason)
                return
            target = folder / "out"
            if older:
                bench.put_older(form, target)
            names = bench.count_steps(form, older)
            filler = folder / "filler"
            left = rng.randrange(0, 300_000) if index % 3 else 0
            step = rng.randint(1, len(names))
            facts = {"form": form, "older": older, "left": left, "step": step}
            with tally.case("disk full (tmpfs)", **facts) as found:
                command = bench.export(form, target, force=older)
                ended = _paused(command, folder, step, partial(_fill, filler, left))
                filler.unlink()
                _failed_or_done(bench, found, ended, form, older, target, "")
                succeeded(run(bench.export(form, target, force=True), folder))
                _nothing_beside(target)


def no_permission(bench: Workbench, tally: Tally, rng: random.Random) -> None:
    """Folders that may not be written to, searched or replaced, and a file system to read only."""
    user = NOBODY if os.geteuid() == 0 else None
    with bench.folder() as folder:
        folder.chmod(0o777)
        control = run(bench.export("safetensors", folder / "out"), folder, Faults(user=user))
        if control.status != 0:
            tally.skip("no permission", f"an unprivileged child cannot work: {control.err[:200]}")
            return
    for form, older, mode in product(FORMATS, (False, True), (0o555, 0o000)):
        with bench.folder() as folder:
            inside = folder / "inside"
            inside.mkdir()
            target = inside / "out"
            if older:
                bench.put_older(form, target)
            inside.chmod(mode)
            with tally.case("no permission", form=form, older=older, mode=mode) as found:
                command = bench.export(form, target, force=older)
                ended = run(command, folder, Faults(user=user))
                inside.chmod(0o755)
                one_line(ended, 2)
                _untouched(bench, found, form, older, target)
    for form, older in product(FORMATS, (False, True)):
        with bench.folder() as folder, _tmpfs(folder, "16m") as reason:
            if reason:
                tally.skip("read-only file system", reason)
                return
            target = folder / "out"
            if older:
                bench.put_older(form, target)
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
            with tally.case("read-only file system", form=form, older=older) as found:
                one_line(run(bench.export(form, target, force=older), folder), 2)
                _untouched(bench, found, form, older, target)


def another_file_system(bench: Workbench, tally: Tally) -> None:
    """The target lies on another file system than the source, TMPDIR and the cache."""
    for form, older in product(FORMATS, (False, True)):
        with bench.folder() as folder, _tmpfs(folder, "16m") as reason:
            if reason:
                tally.skip("target on another file system", reason)
                return
            target = folder / "out"
            if older:
                bench.put_older(form, target)
            with tally.case("target on another file system", form=form, older=older) as found:
                succeeded(run(bench.export(form, target, force=older), folder))
                found.append(bench.state(form, target))
                promise(found == ["new"], "it was not published")
                bench.verify(target)
                _nothing_beside(target)


def two_at_once(bench: Workbench, tally: Tally, rng: random.Random, count: int) -> None:
    """Two different exports to one target; sometimes one of them is killed."""
    for index in range(count):
        form, force, killed = FORMATS[index % 2], index // 2 % 2 == 0, index // 4 % 3 == 0
        name = "two at once" + (", --force" if force else "") + (", one killed" if killed else "")
        delay, moment = rng.uniform(0, 0.05), rng.uniform(0, 0.4)
        with bench.folder() as folder:
            target = folder / "out"
            with tally.case(name, form=form, delay=delay, moment=moment) as found:
                first = start(bench.export(form, target, OLD_KEEP, force=force), folder)
                time.sleep(delay)
                second = start(bench.export(form, target, NEW_KEEP, force=force), folder)
                if killed:
                    time.sleep(moment)
                    first.signal(signal.SIGKILL)
                ends = [first.wait(), second.wait()]
                for ended in ends:
                    if ended.status == -9 and killed:
                        continue
                    if ended.status == 2 and not force:
                        one_line(ended, 2, "is not empty")
                    else:
                        succeeded(ended)
                done = sum(ended.status == 0 for ended in ends)
                promise(done >= 1, "neither published")
                promise(force or done == 1, "both published, and none was asked to replace")
                promise(bench.state(form, target) != "none", "neither is there")
                found.append("new")
                succeeded(run(bench.export(form, target, force=True), folder))
                _nothing_beside(target)


def changing_source(bench: Workbench, tally: Tally, rng: random.Random, count: int) -> None:
    """A shard of the source is cut, rewritten, replaced or removed while an export works."""
    ways: tuple[tuple[str, Callable[[Path], None]], ...] = (
        ("cut", _cut),
        ("rewritten", _rewrite),
        ("replaced", _replace),
        ("removed", Path.unlink),
    )
    for index in range(count):
        (way, change), form = ways[index % 4], FORMATS[index // 4 % 2]
        with bench.folder() as folder:
            model, target = folder / bench.dense.name, folder / "out"
            shutil.copytree(bench.dense, model)
            names = bench.count_steps(form, False)
            step = rng.randint(1, len(names) if rng.random() < 0.3 else _EARLY)
            shard = rng.choice(sorted(model.glob("*.safetensors")))
            facts = {"form": form, "step": step, "event": names[step - 1], "shard": shard.name}
            with tally.case(f"source {way} meanwhile", **facts) as found:
                command = bench.export(form, target, model=model)
                ended = _paused(command, folder / ".out", step, partial(change, shard))
                if ended.status == 0:
                    succeeded(ended)
                    found.append(bench.state(form, target))
                    promise(found == ["new"], "what it published is not of what it read")
                else:
                    one_line(ended, 2)
                    promise(not target.exists(), "it failed and published")
                    found.append("none")
                left = {path.name for path in folder.iterdir()} - {model.name, "out"}
                promise(not left, f"left behind: {sorted(left)}")


def nobody_reads(bench: Workbench, tally: Tally) -> None:
    """stdout is a pipe that nobody reads."""
    for form in FORMATS:
        with bench.folder() as folder:
            target = folder / "out"
            with tally.case("stdout closed", form=form) as found:
                ended = run(bench.export(form, target), folder, Faults(stdout=False))
                promise((ended.status, ended.err) == (141, ""), f"{ended.status}: {ended.err}")
                found.append(bench.state(form, target))
                promise(found == ["new"], "it was not published")
                _nothing_beside(target)


def _failing(
    bench: Workbench,
    tally: Tally,
    name: str,
    facts: dict[str, object],
    form: str,
    older: bool,
    faults: Faults,
    reason: str,
) -> None:
    with bench.folder() as folder:
        target = folder / "out"
        if older:
            bench.put_older(form, target)
        with tally.case(name, older=older, **facts) as found:
            ended = run(bench.export(form, target, force=older), folder, faults)
            _failed_or_done(bench, found, ended, form, older, target, reason)
            succeeded(run(bench.export(form, target, force=True), folder))
            _nothing_beside(target)


def _failed_or_done(
    bench: Workbench,
    found: list[str],
    ended: Ended,
    form: str,
    older: bool,
    target: Path,
    reason: str,
) -> None:
    """One line and nothing changed; or all is well, where the fault came too late to matter."""
    if ended.status == 0:
        succeeded(ended)
        found.append(bench.state(form, target))
        promise(found == ["new"], "it reported success and published nothing")
    elif "in place and whole" in ended.err:
        one_line(ended, 2, reason)
        found.append(bench.state(form, target))
        promise(found == ["new"], "it said that the output is in place")
    else:
        # What was written and cannot be read again fails the checks.
        one_line(ended, 2 if reason else {1, 2}, reason)
        _untouched(bench, found, form, older, target)


def _untouched(bench: Workbench, found: list[str], form: str, older: bool, target: Path) -> None:
    found.append(bench.state(form, target))
    promise(found == ["older" if older else "none"], f"it failed and left {found[0]}")


def _nothing_beside(target: Path) -> None:
    left = {path.name for path in target.parent.iterdir()} - {target.name, "filler"}
    promise(not left, f"left behind: {sorted(left)}")


def _paused(
    command: Sequence[str | Path], folder: Path, step: int, change: Callable[[], None]
) -> Ended:
    """A command that stands still at a step while something changes."""
    child = start(command, folder, Faults(step=step, signals=(signal.SIGSTOP,)))
    try:
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        change()
    except BaseException:
        child.signal(signal.SIGKILL)
        child.wait()
        raise
    child.signal(signal.SIGCONT)
    return child.wait()


@contextmanager
def _tmpfs(folder: Path, size: str) -> Iterator[str]:
    """A small file system on the folder; yields why there is none, or nothing."""
    options = f"size={size},mode=0777"
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True
        )
        reason = mounted.stderr.strip() if mounted.returncode else ""
    except FileNotFoundError:
        reason = "there is no mount command"
    if reason:
        yield f"no tmpfs can be mounted ({reason}); run it as root, or with 'unshare -rm'"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", folder], check=True)


def _fill(path: Path, left: int) -> None:
    """Take up all the space of a file system but about `left` bytes."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    size = path.stat().st_size
    os.truncate(path, max(0, size - left))


def _cut(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 3)


def _rewrite(shard: Path) -> None:
    """Other values of the same shapes, in the same file."""
    data = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = bytes(len(data) - start)
    with shard.open("r+b") as file:
        file.write(data)


def _replace(shard: Path) -> None:
    other = shard.with_suffix(".other")
    shutil.copyfile(shard, other)
    _rewrite(other)
    other.replace(shard)
