"""JSON and text from unchecked files, and reproducible JSON out."""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from spp_export.common.errors import SppError

MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 64
# Objects, lists and strings, keys among them: each costs far more memory than its text does.
MAX_JSON_ITEMS = 1 << 20
_LINE_WIDTH = 100
_CHUNK_BYTES = 1 << 20

# A string, closed or running to the end of the text, or one bracket. Possessive, hence linear time.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def read_bytes(
    path: str | os.PathLike[str],
    *,
    what: str,
    max_bytes: int,
    error: type[SppError] = SppError,
    pipe: bool = True,
) -> bytes:
    """The whole of a file of at most `max_bytes` bytes.

    Raises `error`, in one line that starts with `what` and the path, where the file is missing, a
    directory, unreadable or larger. A pipe is read to its end, within the same limit, where the
    user may have named one; `pipe=False` refuses it, for it could wait for ever.
    """
    label = f"{what} {os.fspath(path)}"
    try:
        if not pipe and stat.S_ISFIFO(os.stat(path).st_mode):
            raise error(f"{label}: expected a file, got a pipe.")
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode):
                if status.st_size > max_bytes:
                    raise _too_large(label, max_bytes, error)
                return read_stream(file, what=label, max_bytes=max_bytes, error=error)
    except FileNotFoundError:
        raise error(f"{label}: no such file.") from None
    except IsADirectoryError:
        raise error(f"{label}: expected a file, got a directory.") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{label}: cannot be read ({reason}).") from None
    raise error(f"{label}: expected a file, got a device or socket.")


def read_stream(
    stream: BinaryIO, *, what: str, max_bytes: int, error: type[SppError] = SppError
) -> bytes:
    """All bytes of an open stream; `error` if there are more than `max_bytes`."""
    chunks: list[bytes] = []
    total = 0
    while chunk := stream.read(_CHUNK_BYTES):
        chunks.append(chunk)
        total += len(chunk)
        if total > max_bytes:
            raise _too_large(what, max_bytes, error)
    return b"".join(chunks)


def decode_utf8(data: bytes, *, what: str, error: type[SppError] = SppError) -> str:
    """Text of UTF-8 bytes without its byte order mark; `error` names the offset of a bad byte."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as problem:
        byte = data[problem.start]
        raise error(
            f"{what}: is not UTF-8, byte 0x{byte:02x} at offset {problem.start}. "
            "Convert the file to UTF-8."
        ) from None


def text_lines(text: str) -> Iterator[str]:
    """The lines of a text without their ends, one at a time; only line feeds end one."""
    return (line.removesuffix("\n") for line in io.StringIO(text, newline="\n"))


def parse_json(
    text: str | bytes,
    *,
    what: str,
    max_depth: int = MAX_JSON_DEPTH,
    max_items: int = MAX_JSON_ITEMS,
    error: type[SppError] = SppError,
) -> Any:
    """The value of a JSON text or of its bytes in UTF-8, read strictly.

    Raises `error`, in one line that starts with `what`, for bad syntax, more than 16 MiB, nesting
    deeper than `max_depth`, more than `max_items` objects, lists and strings, duplicate keys,
    numbers that are not finite, and strings that are not Unicode.
    """
    if isinstance(text, bytes):
        text = decode_utf8(text, what=what, error=error)
    if len(text) > MAX_JSON_BYTES:
        raise _too_large(what, MAX_JSON_BYTES, error)
    if not text.strip():
        raise error(f"{what}: is empty, expected JSON.")
    try:
        _check_extent(text, max_depth, max_items)
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_finite_float,
            parse_float=_finite_float,
            # Only where it is needed: the fast reader of integers calls no function.
            parse_int=_integer if "-0" in text else int,
        )
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as problem:
        place = f"line {problem.lineno}, column {problem.colno}"
        raise error(f"{what}: is not valid JSON at {place}: {problem.msg}.") from None
    except UnicodeEncodeError:
        raise error(f"{what}: has a string with half of a surrogate pair.") from None
    except ValueError as problem:  # ours below, or Python's limit on the digits of an integer
        raise error(f"{what}: {str(problem).split(';')[0]}.") from None
    return value


def read_json(
    path: str | os.PathLike[str],
    *,
    what: str,
    max_bytes: int = MAX_JSON_BYTES,
    max_depth: int = MAX_JSON_DEPTH,
    error: type[SppError] = SppError,
    pipe: bool = True,
) -> Any:
    """The value in a JSON file; `error` as of `read_bytes`, `decode_utf8` and `parse_json`."""
    data = read_bytes(path, what=what, max_bytes=max_bytes, error=error, pipe=pipe)
    return parse_json(data, what=f"{what} {os.fspath(path)}", max_depth=max_depth, error=error)


def dump_json(value: Any) -> str:
    """JSON text for people and for hashing: keys as inserted, two spaces, newline at the end.

    A list stays on one line where it holds only scalars or fits; equal values give equal text.
    """
    return _render(value, indent=0) + "\n"


def json_object(value: Any, place: str, error: type[SppError]) -> dict[str, Any]:
    """`value` if it is a JSON object; else `error`, which names the place."""
    if not isinstance(value, dict):
        raise error(f"{place} is {shown(value)}, expected a JSON object.")
    return value


def shown(value: Any) -> str:
    """A JSON value as an error message shows it: never more than some words."""
    if isinstance(value, (dict, list, tuple)):
        return "a JSON object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _check_extent(text: str, max_depth: int, max_items: int) -> None:
    """ValueError for nesting or a number of items that would be costly to parse."""
    depth = items = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        first = text[match.start()]
        if first in "]}":
            depth -= 1
            continue
        items += 1
        if items > max_items:
            raise ValueError(f"holds more than {max_items} objects, lists and strings")
        if first in "[{":
            depth += 1
            if depth > max_depth:
                raise ValueError(f"is nested deeper than {max_depth} levels")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(repeated)} appears twice in one object")
    return value


def _integer(literal: str) -> int | float:
    """Minus zero is no integer to readers in other languages, and none to us."""
    return -0.0 if literal == "-0" else int(literal)


def _finite_float(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError(f"{literal[:40]} is not a finite number")
    return number


def _render(value: Any, indent: int) -> str:
    if isinstance(value, Mapping):
        items: Iterable[str] = (
            f"{_scalar(_key(key))}: {_render(item, indent + 2)}" for key, item in value.items()
        )
        return _block("{", items, "}", indent)
    if isinstance(value, (list, tuple)):
        if not any(isinstance(item, (Mapping, list, tuple)) for item in value):
            return "[" + ", ".join(map(_scalar, value)) + "]"
        return _block("[", (_render(item, indent + 2) for item in value), "]", indent)
    return _scalar(value)


def _block(opening: str, items: Iterable[str], closing: str, indent: int) -> str:
    parts = list(items)
    if not parts:
        return opening + closing
    line = opening + ", ".join(parts) + closing
    if opening == "[" and "\n" not in line and len(line) + indent <= _LINE_WIDTH:
        return line
    pad = " " * indent
    return f"{opening}\n{pad}  " + f",\n{pad}  ".join(parts) + f"\n{pad}{closing}"


def _key(key: Any) -> str:
    assert isinstance(key, str), f"JSON key {key!r} is not a string"
    return key


def _scalar(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _too_large(what: str, most: int, error: type[SppError]) -> SppError:
    return error(f"{what}: is larger than {_megabytes(most)}, the most that is read.")


def _megabytes(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count} bytes"
