"""Progress where there is no terminal: lines, a few seconds apart."""

from __future__ import annotations

import io
import threading

import pytest

from spp_cli.lines import Lines, _line, _Stage
from spp_cli.output import Output
from spp_export.common.progress import progress, report_to


class Written(io.StringIO):
    """A stream that tells when it has a number of lines."""

    def __init__(self, lines):
        super().__init__()
        self.enough, self._lines = threading.Event(), lines

    def write(self, text):
        count = super().write(text)
        if self.getvalue().count("\n") >= self._lines:
            self.enough.set()
        return count


@pytest.fixture(autouse=True)
def afterwards():
    yield
    report_to(None)


def test_the_innermost_stage_is_reported_with_what_is_left():
    stream = Written(2)
    report_to(Lines(stream, 0.01))
    with progress("outer", None), progress("inner", 200) as advance_to:
        advance_to(50)
        assert stream.enough.wait(60)
    lines = stream.getvalue().splitlines()
    assert all(line.startswith("inner: 25%, ") and line.endswith(" left") for line in lines)
    after = stream.getvalue()
    with progress("next", None):
        pass
    assert stream.getvalue() == after


def test_short_work_says_nothing_and_no_thread_is_left():
    stream, before = io.StringIO(), threading.active_count()
    report_to(Lines(stream, 3600))
    with progress("short", 3) as advance_to:
        advance_to(3)
    with pytest.raises(KeyboardInterrupt), progress("interrupted", None):
        raise KeyboardInterrupt
    assert stream.getvalue() == ""
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("stage", "now", "expected"),
    [
        (_Stage("reading", None, 100.0), 112.4, "reading: 12 s"),
        (_Stage("reading", 8.0, 100.0), 225.0, "reading: 2 min 5 s"),
        (_Stage("reading", 8.0, 100.0, 2.0), 130.0, "reading: 25%, 30 s, about 1 min 30 s left"),
        (_Stage("reading", 8.0, 100.0, 9.0), 130.0, "reading: 100%, 30 s, about 0 s left"),
    ],
)
def test_a_line(stage, now, expected):
    assert _line(stage, now) == expected


@pytest.mark.parametrize(
    ("quiet", "seconds", "lines"), [(False, "0.01", 1), (True, "0.01", 0), (False, "0", 0)]
)
def test_commands_report_to_a_stream_that_is_no_terminal(monkeypatch, quiet, seconds, lines):
    monkeypatch.setenv("SPP_PROGRESS_SECONDS", seconds)
    stream = Written(1)
    monkeypatch.setattr("sys.stderr", stream)
    Output(quiet=quiet)
    with progress("working", None):
        if lines:
            assert stream.enough.wait(60)
    assert bool(stream.getvalue()) == bool(lines)
