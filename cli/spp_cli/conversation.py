"""A conversation on a terminal or through pipes: questions in, answers out as they come."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from spp_cli.output import Output, write_error, write_text, write_warning
from spp_cli.render.look import byte_size, peak_memory
from spp_cli.render.look import seconds as duration
from spp_export.common.errors import SppError, UsageError

if TYPE_CHECKING:
    from spp_export.commands.chat.chat import Answer

Ask = Callable[[str], "Answer"]

_PROMPT = "> "
# What a model writes must not steer the terminal: escape sequences, bells, carriage returns.
_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
}


def show_piece(text: str) -> None:
    """A piece of an answer, as it is in a pipe and without control characters on a terminal."""
    if text:
        write_text(text.translate(_CONTROLS) if sys.stdout.isatty() else text)


def answer_once(ask: Ask, prompt: str, out: Output) -> None:
    """One answer. Interrupted, it ends the command."""
    answer = _answer(ask, prompt, out)
    if answer.ending == "interrupted":
        raise KeyboardInterrupt


def converse(ask: Ask, reset: Callable[[], None], out: Output) -> None:
    """Answer every line until there are no more, or /quit."""
    terminal = sys.stdin.isatty()
    for line in _typed_lines() if terminal else _piped_lines():
        command = line.strip()
        if command == "/quit":
            return
        if command == "/reset":
            reset()
            out.note("what was said is forgotten.")
        elif command:
            try:
                _answer(ask, line, out)
            except SppError as error:
                if not terminal:
                    raise
                write_error(str(error))


def closing_line(answer: Answer) -> str:
    """What an answer took."""
    made = len(answer.token_ids)
    parts = [f"{made} token{'s' * (made != 1)}"]
    if answer.ending == "length":
        parts[0] += " (--max-new-tokens)"
    elif answer.ending == "interrupted":
        parts[0] += " (interrupted)"
    if answer.tokens_per_second is not None:
        parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    first = answer.first_token_seconds
    if first is not None:
        wait = duration(first) if first >= 1 else f"{1000 * first:.0f} ms"
        parts.append(f"first token after {wait}")
    parts.append(f"peak memory {byte_size(peak_memory())}")
    return ", ".join(parts)


def _answer(ask: Ask, prompt: str, out: Output) -> Answer:
    answer = ask(prompt)
    write_text("\n")
    out.note(closing_line(answer))
    if answer.ending == "context":
        write_warning("the answer ends here because the model's context is full.")
    return answer


def _typed_lines() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives `input` a line to edit and a history
    while True:
        try:
            yield _typed_line()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:  # drops the line, as in a shell
            print(file=sys.stderr)


def _typed_line() -> str:
    if sys.stdout.isatty():
        return input(_PROMPT)
    print(_PROMPT, end="", file=sys.stderr, flush=True)
    return input()


def _piped_lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise UsageError("standard input is not UTF-8 text.") from None
