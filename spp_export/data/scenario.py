"""A scenario: sample text of what the deployed model will be used for."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePath
from typing import Any, BinaryIO

from spp_export.common.errors import ScenarioError, UsageError
from spp_export.common.json_files import (
    decode_utf8,
    parse_json,
    read_bytes,
    read_stream,
    text_lines,
)

MAX_SCENARIO_BYTES = 64 << 20
MAX_PROMPTS = 1 << 18
MIN_PROMPTS_TO_HOLD_OUT = 4


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of a structured file, with what the file records of it.

    `session` counts conversations from 0: the turns of one published scenario share it, and every
    line of a `.jsonl` file is its own. `answer` is the reference answer, where there is one.
    """

    session: int
    prompt: str
    answer: str | None = None
    task_type: str | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """Prompts in the order of the file, the file's name without its directory and its SHA-256.

    `description` is the first conversation's `topic_description`; `turns` holds one entry per
    prompt for `.json` and `.jsonl`, and is empty for plain text.
    """

    name: str
    sha256: str
    prompts: tuple[str, ...]
    description: str | None = None
    turns: tuple[Turn, ...] = ()

    def split(self, held_out: float = 0.25) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Prompts to calibrate on and prompts held out, both in order.

        The share `held_out` (0 to below 1) is spread evenly, so 0.25 holds out every fourth prompt.
        Fewer than four prompts hold nothing out. Raises UsageError for any other share.
        """
        if not 0 <= held_out < 1:
            raise UsageError(f"held-out share: expected 0 to below 1, got {held_out}.")
        if len(self.prompts) < MIN_PROMPTS_TO_HOLD_OUT:
            return self.prompts, ()
        calibration: list[str] = []
        reserved: list[str] = []
        for index, prompt in enumerate(self.prompts):
            crosses = math.floor((index + 1) * held_out) > math.floor(index * held_out)
            (reserved if crosses else calibration).append(prompt)
        return tuple(calibration), tuple(reserved)


def read_scenario(path: str | os.PathLike[str], *, stdin: BinaryIO | None = None) -> Scenario:
    """The scenario in a file, or on standard input where `path` is `-`.

    `.txt` holds paragraphs, a blank line between prompts; `.jsonl` a `prompt` or `text` per line
    (and an `answer`, if known); `.json` one published scenario or a list of them. Standard input
    and files without a suffix are JSON lines if they begin with `{`, else paragraphs.

    Raises ScenarioError where the file cannot be read, is not UTF-8 or not of its format, or holds
    no prompt.
    """
    if os.fspath(path) == "-":
        name, label = "stdin", "scenario on standard input"
        stream = stdin if stdin is not None else sys.stdin.buffer
        data = read_stream(stream, what=label, max_bytes=MAX_SCENARIO_BYTES, error=ScenarioError)
    else:
        name, label = _printable(PurePath(path).name), f"scenario {os.fspath(path)}"
        data = read_bytes(path, what="scenario", max_bytes=MAX_SCENARIO_BYTES, error=ScenarioError)
    text = decode_utf8(data, what=label, error=ScenarioError)
    if not text.strip():
        raise ScenarioError(f"{label}: is empty. Write the prompts the model will be asked.")
    description, turns, plain = _parser(path, text, label)(text, label)
    prompts = plain or tuple(turn.prompt for turn in turns)
    if not prompts:
        raise ScenarioError(f"{label}: holds no prompt.")
    if len(prompts) > MAX_PROMPTS:
        raise _too_many(label)
    digest = hashlib.sha256(data).hexdigest()
    return Scenario(name, digest, prompts, description, turns)


def paragraphs(text: str, *, what: str) -> tuple[str, ...]:
    """The paragraphs of a text, without the white space around them; blank lines separate them.

    Raises ScenarioError, naming the line, where the text holds a NUL character.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ScenarioError(f"{what}: line {line} holds a NUL character; this is not a text file.")
    groups = groupby(text_lines(text), key=lambda line: bool(line.strip()))
    return tuple("\n".join(lines).strip() for filled, lines in groups if filled)


_Parsed = tuple[str | None, tuple[Turn, ...], tuple[str, ...]]


def _parser(path: str | os.PathLike[str], text: str, label: str) -> Callable[[str, str], _Parsed]:
    suffix = PurePath(path).suffix.lower()
    if not suffix:
        suffix = ".jsonl" if text.lstrip().startswith("{") else ".txt"
    try:
        return {".txt": _parse_text, ".jsonl": _parse_lines, ".json": _parse_published}[suffix]
    except KeyError:
        raise ScenarioError(
            f"{label}: expected a file named .txt, .jsonl or .json, got {suffix!r}."
        ) from None


def _parse_text(text: str, label: str) -> _Parsed:
    return None, (), paragraphs(text, what=label)


def _parse_lines(text: str, label: str) -> _Parsed:
    turns: list[Turn] = []
    # Not splitlines(), which also breaks at characters that JSON strings may hold.
    for number, line in enumerate(text_lines(text), start=1):
        if not line.strip():
            continue
        where = f"{label}: line {number}"
        entry = _object(parse_json(line, what=where, error=ScenarioError), where)
        prompt = _prompt(entry, ("prompt", "text"), where)
        turns.append(Turn(len(turns), prompt, _answer(entry, where)))
        if len(turns) > MAX_PROMPTS:
            raise _too_many(label)
    return None, tuple(turns), ()


def _too_many(label: str) -> ScenarioError:
    return ScenarioError(
        f"{label}: holds more than {MAX_PROMPTS} prompts, the most that are read. "
        "Take a sample of them."
    )


def _parse_published(text: str, label: str) -> _Parsed:
    """The format SubspacePath Pruner published: a scenario is an object with `turns`."""
    value = parse_json(text, what=label, error=ScenarioError)
    scenarios = value if isinstance(value, list) else [value]
    if not scenarios:
        raise ScenarioError(f"{label}: is an empty list.")
    turns: list[Turn] = []
    for index, entry in enumerate(scenarios):
        where = f"{label}: scenario {index}"
        turns.extend(_published_turns(index, _object(entry, where), where))
    description = _optional_string(scenarios[0], "topic_description", f"{label}: scenario 0")
    return description or None, tuple(turns), ()


def _published_turns(session: int, entry: dict[str, Any], where: str) -> Iterator[Turn]:
    turns = entry.get("turns")
    if not isinstance(turns, list):
        raise ScenarioError(f"{where}: expected a list 'turns', got {_kind(turns)}.")
    for number, value in enumerate(turns, start=1):
        here = f"{where}, turn {number}"
        turn = _object(value, here)
        prompt = _prompt(turn, ("prompt", "query"), here)
        yield Turn(session, prompt, _answer(turn, here), _optional_string(turn, "task_type", here))


def _prompt(entry: dict[str, Any], keys: tuple[str, str], where: str) -> str:
    key = next((key for key in keys if entry.get(key) is not None), None)
    if key is None:
        raise ScenarioError(f"{where}: expected the key '{keys[0]}' or '{keys[1]}'.")
    prompt = _optional_string(entry, key, where)
    if not prompt or not prompt.strip():
        raise ScenarioError(f"{where}: {key!r} is empty.")
    return prompt


def _answer(entry: dict[str, Any], where: str) -> str | None:
    """The answer; of a list of accepted answers the first, as in the published evaluation."""
    answer = entry.get("answer")
    if isinstance(answer, list):
        entry = {"answer": answer[0] if answer else None}
    return _optional_string(entry, "answer", where)


def _optional_string(entry: dict[str, Any], key: str, where: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise ScenarioError(f"{where}: expected {key!r} to be a string, got {_kind(value)}.")
    if value is not None and "\0" in value:
        raise ScenarioError(f"{where}: {key!r} holds a NUL character.")
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ScenarioError(f"{where}: expected an object, got {_kind(value)}.")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "a boolean"
    kinds = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return kinds[type(value)]


def _printable(name: str) -> str:
    """A file name as Unicode text, whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", "replace")
