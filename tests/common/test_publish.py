from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from spp_export.common import publish as atomic
from spp_export.common.errors import OutputError
from spp_export.common.manifest import write_manifest
from spp_export.common.publish import publish, require_free_space


def fill(work: Path, text: str = "new") -> None:
    (work / "sub").mkdir()
    (work / "sub" / "file").write_text(text)
    write_manifest(work)


def content(target: Path) -> str:
    return (target / "sub" / "file").read_text()


def siblings(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path != target)


@pytest.fixture
def ours(tmp_path):
    target = tmp_path / "out"
    with publish(target) as work:
        fill(work, "old")
    return target


def test_appears_whole(tmp_path):
    target = tmp_path / "a" / "b" / "out"
    with publish(target) as work:
        assert work.parent.parent == target.parent
        assert work.parent.name.startswith(".out.spp-")
        fill(work)
        assert not target.exists()
    assert content(target) == "new"
    assert siblings(target) == []


def test_an_empty_directory_is_accepted(tmp_path):
    (tmp_path / "out").mkdir()
    with publish(tmp_path / "out") as work:
        fill(work)
    assert content(tmp_path / "out") == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("force", [False, True])
def test_an_exception_changes_nothing(tmp_path, ours, error, force):
    target = ours if force else tmp_path / "p" / "q" / "none"
    with pytest.raises(error), publish(target, force=force) as work:  # noqa: PT012
        fill(work)
        raise error
    assert siblings(ours) == []
    assert content(ours) == "old"


def test_force_replaces_what_we_wrote(ours):
    with publish(ours, force=True) as work:
        fill(work)
        assert content(ours) == "old"
    assert content(ours) == "new"
    assert siblings(ours) == []


def test_without_renameat2(ours, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    with publish(ours, force=True) as work:
        fill(work)
    assert content(ours) == "new"
    assert siblings(ours) == []


def test_a_failing_second_rename_is_undone(ours, monkeypatch):
    rename, calls = Path.rename, []

    def fail_second(self, other):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, other)

    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(OutputError, match="Input/output"), publish(ours, force=True) as work:
        fill(work)
    assert content(ours) == "old"
    assert siblings(ours) == []


def start(target: Path, force: bool = False) -> None:
    with publish(target, force=force):
        raise AssertionError("work began")


def test_refused_before_any_work(tmp_path, ours, monkeypatch):
    with pytest.raises(OutputError, match="not empty"):
        start(ours)
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"no manifest\.json of spp"):
        start(foreign, force=True)
    (foreign / "manifest.json").write_text('{"tool": "other"}')
    with pytest.raises(OutputError, match=r"no manifest\.json of spp"):
        start(foreign, force=True)
    with pytest.raises(OutputError, match="not a directory"):
        start(foreign / "thesis.tex", force=True)
    with pytest.raises(OutputError, match="cannot be written"):
        start(foreign / "thesis.tex" / "out")
    with pytest.raises(OutputError, match="mount point"):
        start(Path("/"))
    with pytest.raises(OutputError, match="cannot be written"):
        start(tmp_path / ("x" * 250))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="current directory"):
        start(Path())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]


def test_a_target_filled_while_we_worked_is_kept(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="not empty"), publish(target) as work:  # noqa: PT012
        fill(work)
        target.mkdir()
        (target / "theirs").write_text("x")
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert siblings(target) == []


@pytest.mark.parametrize("ours", [True, False])
def test_a_target_filled_in_the_last_instant_is_replaced_by_force_if_ours(
    tmp_path, monkeypatch, ours
):
    target = tmp_path / "out"
    rename, filled = Path.rename, []

    def late(self, to):
        if to == target and not filled:
            filled.append(True)
            target.mkdir()
            fill(target)
            if not ours:
                (target / "manifest.json").unlink()
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", late)
    if ours:
        with publish(target, force=True) as work:
            fill(work, "newer")
        assert content(target) == "newer"
    else:
        refused = pytest.raises(OutputError, match=r"no manifest\.json of spp")
        with refused, publish(target, force=True) as work:
            fill(work, "newer")
        assert content(target) == "new"
    assert siblings(target) == []


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "out").symlink_to("big-disk")
    with publish(tmp_path / "out") as work:
        fill(work)
    assert (tmp_path / "out").is_symlink()
    assert content(tmp_path / "big-disk") == "new"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with publish(tmp_path / "p" / "out") as work:
            fill(work)
    finally:
        os.umask(before)
    for path in (tmp_path / "p", tmp_path / "p" / "out", tmp_path / "p" / "out" / "sub"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((tmp_path / "p/out/sub/file").stat().st_mode) == 0o666 & ~umask


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def spy_fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def spy_rename(self, other):
        if Path(other) == tmp_path / "out":
            events.append("rename")
        return rename(self, other)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "rename", spy_rename)
    with publish(tmp_path / "out") as work:
        fill(work)
        expected = {str(work), str(work / "sub")} | {
            str(path) for path in work.rglob("*") if path.is_file()
        }
    assert set(events[: events.index("rename")]) == expected
    assert events[events.index("rename") + 1 :] == [str(tmp_path)]


CHILD = """
    import signal, sys
    from pathlib import Path
    from spp_export.common.publish import publish
    with publish(Path(sys.argv[1]), force=True) as work:
        (work / "half").write_text("half")
        print("ready", flush=True)
        while True:
            signal.pause()
"""


def run_child(target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(target)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def finish(child: subprocess.Popen[str], number: int) -> None:
    child.send_signal(number)
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


@pytest.mark.parametrize("there", [False, True])
def test_kill_leaves_no_target_and_the_next_run_cleans_up(tmp_path, ours, there):
    target = ours if there else tmp_path / "other"
    child = run_child(target)
    try:
        (leftover,) = (path for path in tmp_path.iterdir() if path.name.startswith("."))
        # Another run must not touch what a living one is writing.
        with pytest.raises(ValueError, match="stop"), publish(target, force=True):
            raise ValueError("stop")
        assert (leftover / "new" / "half").exists()
    finally:
        finish(child, signal.SIGKILL)
    assert content(ours) == "old"
    assert target.exists() == there
    assert leftover.exists()
    with publish(target, force=True) as work:
        fill(work)
    assert content(target) == "new"
    assert not leftover.exists()


def test_ctrl_c_cleans_up_at_once(tmp_path):
    child = run_child(tmp_path / "out")
    finish(child, signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def test_an_old_target_put_aside_by_a_dead_process_comes_back(ours):
    place = ours.parent / ".out.spp-1-0123abcd"  # a pid that lives, and is another's by now
    place.mkdir()
    ours.rename(place / "old")
    with pytest.raises(OutputError, match="not empty"):
        start(ours)
    assert content(ours) == "old"
    assert siblings(ours) == []


def test_neighbours_are_left_alone(tmp_path, ours):
    names = [
        ".out.spp-1-0123abcd.bak",
        ".out.spp-x",
        ".other.spp-999999-0123abcd",
        "out.spp-1-0123abcd",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.spp-1-0123abcd").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.spp-2-0123abcd").symlink_to("elsewhere")
    before = siblings(ours)
    with publish(ours, force=True) as work:
        fill(work)
    assert siblings(ours) == before


def test_an_error_about_another_file_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), publish(tmp_path / "out"):
        (tmp_path / "source").read_text()
    with pytest.raises(ConnectionError), publish(tmp_path / "out"):
        raise ConnectionError("no number: not from the system")
    with pytest.raises(OutputError, match="No space left"), publish(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_without_force_nothing_is_replaced_in_the_last_instant(tmp_path, monkeypatch):
    target = tmp_path / "out"

    def too_late(path, force):
        path.mkdir()
        (path / "theirs").write_text("x")

    with pytest.raises(OutputError, match="is not empty"), publish(target) as work:  # noqa: PT012
        fill(work)
        monkeypatch.setattr(atomic, "_check", too_late)
    assert [path.name for path in target.iterdir()] == ["theirs"]


def test_a_rename_that_the_disk_does_not_confirm(ours, monkeypatch):
    def fail_for_parent(path):
        if path == ours.parent:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic, "sync", fail_for_parent)
    with pytest.raises(OutputError, match="in place and whole"), publish(ours, force=True) as work:
        fill(work)
    assert content(ours) == "new"
    assert siblings(ours) == []


def test_free_space(tmp_path):
    require_free_space(tmp_path / "not" / "there", 1)
    with pytest.raises(OutputError, match="are free"):
        require_free_space(tmp_path, 1 << 60)
