"""What a command prints: data on stdout, everything else on stderr, in one of three modes."""

from __future__ import annotations

import json as json_library
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

from spp_cli.render.look import ASCII, FAINT, UNICODE, WIDTH, Look, single_line
from spp_export.common.progress import Listener, report_to

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class PipeClosedError(Exception):
    """The reader of our stdout is gone."""


class Output:
    """Human (tables, bars, hints), json (one object) or quiet (at most the essential line)."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self._stderr = sys.stderr
        report_to(None)
        if not quiet:
            report_to(_listener(self._stderr))

    def result(
        self,
        data: Callable[[], Mapping[str, Any]],
        human: Callable[[Look], RenderableType],
        brief: str = "",
    ) -> None:
        """The command's answer, in the form that the mode asks for."""
        if self.json:
            write_json(data())
        elif self.quiet:
            write_text(brief + "\n" if brief else "")
        else:
            console = stdout_console()
            base = UNICODE if _speaks_unicode(console.encoding) else ASCII
            with console.capture() as captured:
                console.print(human(replace(base, width=console.width)))
            text = captured.get()
            write_text(text if console.is_terminal else _without_padding(text))

    def note(self, text: str) -> None:
        """A faint line about what was just done, for people only."""
        if not self.json and not self.quiet:
            from rich.console import Console
            from rich.text import Text

            console = Console(file=self._stderr, highlight=False)
            console.print(Text(single_line(text), style=FAINT), soft_wrap=True)

    def hint(self, text: str) -> None:
        """What to do next, for people only."""
        if not self.json and not self.quiet:
            print(f"next: {single_line(text)}", file=self._stderr)


def _listener(stream: TextIO) -> Listener | None:
    """Bars on a terminal, and a line now and then elsewhere."""
    if stream.isatty():
        from spp_cli.progress import Bars

        return Bars(stream)
    from spp_cli.lines import Lines, seconds_between

    seconds = seconds_between()
    return Lines(stream, seconds) if seconds else None


def stdout_console() -> Console:
    """A console on stdout: the terminal's width up to ours, and ours where there is none."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    return console


def write_json(data: Mapping[str, Any]) -> None:
    """One JSON object on stdout, in ASCII, which every encoding carries."""
    write_text(json_library.dumps(_finite(data), indent=2, allow_nan=False) + "\n")


def write_error(message: str) -> None:
    """The one line that a failing command leaves on stderr."""
    print(f"error: {single_line(message)}", file=sys.stderr)


def write_warning(message: str) -> None:
    """One line on stderr about something that did not stop the command."""
    print(f"warning: {single_line(message)}", file=sys.stderr)


def write_text(text: str) -> None:
    """Text on stdout, at once."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise PipeClosedError from None


def _without_padding(text: str) -> str:
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


def _finite(value: Any) -> Any:
    """The same value with null for numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _speaks_unicode(encoding: str) -> bool:
    return encoding.lower().replace("-", "").startswith("utf")
