"""A scenario: sample text of what the deployed model will be used for."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from spp_export.data.conversation import Conversation, Turn, plain
from spp_export.data.duplicates import likeness_groups, normalised
from spp_export.data.records import is_messages, optional_string, read_record
from spp_export.data.tables import csv_rows, parquet_rows

MAX_SCENARIO_BYTES = 64 << 20
MAX_PROMPTS = 1 << 18
MIN_PROMPTS_TO_HOLD_OUT = 4
# A paragraph of so many lines is looked at: a person may have meant a prompt by each.
_MANY_LINES = 8
_SENTENCE_ENDS = tuple(".?!…。؟।\"')»」』\uff1f\uff01\u201d\u2019")
# How lines of code begin.
_CODE = re.compile(
    r"(import|from|def|class|return|if|elif|else|for|while|with|try|except|raise|assert|yield|const"
    r"|let|var|public|private|static|using|package|func|fn)\b|@"
)
_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswersRecord:
    """Which file has answers to a scenario's prompts, and how many of them it answers."""

    name: str
    sha256: str
    answered: int


@dataclass(frozen=True)
class Scenario:
    """Conversations in the order of the file, the file's name without its directory, its SHA-256.

    `description` is the first conversation's `topic_description`; `turns` holds one entry per
    prompt, in the order of conversations, and is empty for `.txt`. `answers` says of a file with
    answers to its prompts which it is, and how many it answers.
    """

    name: str
    sha256: str
    conversations: tuple[Conversation, ...]
    description: str | None = None
    turns: tuple[Turn, ...] = ()
    answers: AnswersRecord | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """What users say, in order."""
        return tuple(
            prompt for conversation in self.conversations for prompt in conversation.prompts
        )

    @property
    def distinct(self) -> int:
        """How many conversations there are where those that are alike count as one."""
        return max(self._groups, default=-1) + 1

    @cached_property
    def _groups(self) -> list[int]:
        """The group of like conversations of each."""
        return likeness_groups([conversation.content for conversation in self.conversations])

    def split(
        self, held_out: float = 0.25
    ) -> tuple[tuple[Conversation, ...], tuple[Conversation, ...]]:
        """Conversations to calibrate on and conversations held out, both in order.

        The share `held_out` (0 to below 1) is spread evenly, so 0.25 holds out every fourth prompt.
        Conversations that are alike (`likeness_groups`) stay on one side, and of those that are the
        same, one is held out. Fewer than four that are not alike hold nothing out. Raises
        UsageError for any other share.
        """
        if not 0 <= held_out < 1:
            raise UsageError(f"held-out share: expected 0 to below 1, got {held_out}.")
        sizes = Counter(self._groups)
        reserved = _held_out_groups(list(sizes.values()), held_out)
        calibration: list[Conversation] = []
        apart: dict[str, Conversation] = {}
        for conversation, group in zip(self.conversations, self._groups, strict=True):
            if group in reserved:
                apart.setdefault(normalised(conversation.content), conversation)
            else:
                calibration.append(conversation)
        return tuple(calibration), tuple(apart.values())


def _held_out_groups(sizes: Sequence[int], share: float) -> set[int]:
    """Indices of the groups that are held out: an even share of them, and no more of what is in
    them than that."""
    if len(sizes) < MIN_PROMPTS_TO_HOLD_OUT or not share:
        return set()
    reserved: set[int] = set()
    seen = held = 0
    for index, size in enumerate(sizes):
        seen += size
        more = math.floor((index + 1) * share) > len(reserved)
        if more and held + size <= math.floor(seen * share):
            reserved.add(index)
            held += size
    if not reserved and math.floor(len(sizes) * share):
        # A few groups of very different sizes: the smallest of them, the last of these.
        return {min(range(len(sizes)), key=lambda index: (sizes[index], -index))}
    return reserved


def read_scenario(
    path: str | os.PathLike[str], *, stdin: BinaryIO | None = None, what: str = "scenario"
) -> Scenario:
    """The scenario in a file, or on standard input where `path` is `-`; messages call it `what`.

    `.txt` holds paragraphs, a blank line between prompts. `.jsonl` and `.json` hold records
    (`data.records`), one per line or in a list, `.csv`, `.tsv` and `.parquet` one per row. Standard
    input and files without a suffix are told apart by how they begin.

    Raises ScenarioError where the file cannot be read, is not UTF-8 or not of its format, or holds
    no prompt.
    """
    if os.fspath(path) == "-":
        name, label = "stdin", f"{what} on standard input"
        stream = stdin if stdin is not None else sys.stdin.buffer
        data = read_stream(stream, what=label, max_bytes=MAX_SCENARIO_BYTES, error=ScenarioError)
    else:
        name, label = _printable(PurePath(path).name), f"{what} {os.fspath(path)}"
        data = read_bytes(path, what=what, max_bytes=MAX_SCENARIO_BYTES, error=ScenarioError)
    kind = PurePath(path).suffix.lower() or _kind_of(data)
    if kind not in _SUFFIXES:
        raise ScenarioError(
            f"{label}: expected a file named {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}, got "
            f"{kind!r}. A copy named .txt is read as text."
        )
    digest = hashlib.sha256(data).hexdigest()
    if kind == ".parquet":
        return _scenario(name, digest, parquet_rows(data, label, MAX_SCENARIO_BYTES), label)
    text = decode_utf8(data, what=label, error=ScenarioError)
    if not text.strip():
        raise ScenarioError(f"{label}: is empty. Write the prompts the model will be asked.")
    if kind == ".txt":
        prompts = paragraphs(text, what=label)
        if len(prompts) > MAX_PROMPTS:
            raise _too_many(label)
        warn_of_lists(prompts, label)
        return Scenario(name, digest, tuple(map(plain, prompts)))
    rows = csv_rows(text, label) if kind in (".csv", ".tsv") else _json_values(kind, text, label)
    return _scenario(name, digest, rows, label)


def _kind_of(data: bytes) -> str:
    """The suffix that a file without one would have, by how it begins."""
    if data.startswith(b"PAR1"):
        return ".parquet"
    start = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip()
    return ".jsonl" if re.match(rb"\{|\[\s*[\[{]", start) else ".txt"


def _scenario(name: str, digest: str, values: Iterable[tuple[str, Any]], label: str) -> Scenario:
    """The scenario of records, each with where it is."""
    conversations: list[Conversation] = []
    turns: list[Turn] = []
    description: str | None = None
    for where, value in values:
        conversation, of_conversation = read_record(value, len(conversations), where)
        if not conversations and isinstance(value, dict):
            description = optional_string(value, "topic_description", where) or None
        conversations.append(conversation)
        turns += of_conversation
        if max(len(conversations), len(turns)) > MAX_PROMPTS:
            raise _too_many(label)
    if not conversations:
        raise ScenarioError(f"{label}: holds no prompt.")
    return Scenario(name, digest, tuple(conversations), description, tuple(turns))


def _json_values(kind: str, text: str, label: str) -> Iterator[tuple[str, Any]]:
    """Records of a file that has one per line, whatever it is called, or else one value: a record,
    or a list of them."""
    if _has_values_by_line(kind, text):
        # Not splitlines(), which also breaks at characters that JSON strings may hold.
        for number, line in enumerate(text_lines(text), start=1):
            if line.strip():
                where = f"{label}: line {number}"
                yield where, parse_json(line, what=where, error=ScenarioError)
        return
    value = parse_json(text, what=label, error=ScenarioError)
    values = value if isinstance(value, list) and not is_messages(value) else [value]
    if not values:
        raise ScenarioError(f"{label}: is an empty list.")
    for number, entry in enumerate(values, start=1):
        yield f"{label}: conversation {number}", entry


def _has_values_by_line(kind: str, text: str) -> bool:
    filled = (line.strip() for line in text_lines(text) if line.strip())
    first, following = next(filled), next(filled, None)
    whole = first[0] + first[-1] in ("{}", "[]")
    if kind == ".jsonl" and first[0] != "[":
        return True
    return whole and following is not None


def warn_of_lists(prompts: Sequence[str], label: str) -> None:
    """Say so where lines of a paragraph look like prompts of their own."""
    for number, prompt in enumerate(prompts, start=1):
        lines = [line.rstrip() for line in prompt.split("\n")]
        if len(lines) >= _MANY_LINES and _look_like_prompts(lines):
            _log.warning(
                "%s: the %d lines of paragraph %d look like prompts of their own, and are read as "
                "one. Put a blank line between prompts, as by: sed G FILE",
                label,
                len(lines),
                number,
            )
            return


def _look_like_prompts(lines: Sequence[str]) -> bool:
    """Whether most lines end as sentences do, or are too short to be lines of a wrapped text, which
    are about as long as the longest. Lines of code, lists and tables are none."""
    other = sum(
        line[:1] in " \t#/|-*>" or line[-1:] in ":;{}(,|=\\" or bool(_CODE.match(line))
        for line in lines
    )
    if other > len(lines) / 4:
        return False
    sentences = sum(line.endswith(_SENTENCE_ENDS) for line in lines)
    longest = max(map(len, lines))
    short = sum(len(line) < 0.75 * longest for line in lines)
    return max(sentences, short) > 0.5 * len(lines)


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


def _too_many(label: str) -> ScenarioError:
    return ScenarioError(
        f"{label}: holds more than {MAX_PROMPTS} prompts, the most that are read. "
        "Take a sample of them."
    )


def _printable(name: str) -> str:
    """A file name as Unicode text, whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", "replace")
