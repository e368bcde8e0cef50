"""Damage to files. Every choice comes from a seeded generator, so any input can be made again."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

# (generator, file, other files of the same kind) -> damaged file
Mutation = Callable[[Random, bytes, Sequence[bytes]], bytes]

_BITS = (7, 8, 15, 16, 31, 32, 48, 53, 63, 64)
_POWERS = tuple(1 << bit for bit in _BITS)
BOUNDARIES = (0, 1, -1, 2, 3, *_POWERS, *(n - 1 for n in _POWERS), *(-n for n in _POWERS))
ODD_NUMBERS = (
    *map(str, BOUNDARIES),
    *("-0", "1.0", "1e0", "0.5", "-0.5", "1e308", "1e400", "-1e400", "1e-400", "01", "1.", "0x10"),
    *("NaN", "Infinity", "-Infinity", "true", "null", '"1"', "[1]", "9" * 400, "9" * 5000),
)
ODD_TEXTS = (
    *("", " ", ".", "..", "/", "../x", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\\b", "a/b"),
    *("a\0b", "\0", "a\nb", "a\r\x85\u2028b", "\x1b[2J", "\ufeff", "é" * 3, "x" * 300, "y" * 70000),
    *("config.json", "model.safetensors", "F32", "BF16", "llama", "true", "{}", "%s", "{0}"),
)
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_DEPTHS = (2, 31, 63, 64, 65, 1000, 100_000)


def damage_bytes(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One change that knows nothing of the format."""
    return rng.choice(_BYTE_MUTATIONS)(rng, data, others)


def damage_json(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One change to a JSON text: to its tree, to a number in it, or to its bytes."""
    kind = rng.random()
    if kind < 0.6 and (tree := _parsed(data)) is not None:
        return rng.choice(_TREE_MUTATIONS)(rng, [tree])
    return (_odd_number if kind < 0.75 else damage_bytes)(rng, data, others)


def damage_lines(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One change to JSON lines: within a line, or to their order."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    kind = rng.random()
    if kind < 0.7:
        lines[place] = damage_json(rng, lines[place], others)
    elif kind < 0.8:
        lines.insert(place, rng.choice(lines))
    elif kind < 0.9:
        del lines[place]
    else:
        return damage_bytes(rng, data, others)
    return b"\n".join(lines)


def damage_safetensors(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One change to a safetensors file, most often one after which its header's length is right."""
    kind = rng.random()
    if kind < 0.15 or len(data) < 8:
        return damage_bytes(rng, data, others)
    if kind < 0.25:
        return struct.pack("<Q", rng.choice(BOUNDARIES) % (1 << 64)) + data[8:]
    end = 8 + int.from_bytes(data[:8], "little")
    header, rest = data[8:end], data[end:]
    changed = (damage_json if kind < 0.85 else damage_bytes)(rng, header, ())
    return struct.pack("<Q", len(changed)) + changed + rest


def damage_protobuf(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One change to a protobuf message, most often one after which all its lengths are right."""
    if rng.random() < 0.25 or (fields := _fields(data)) is None:
        return damage_bytes(rng, data, others)
    place = fields
    while nested := [index for index, field in enumerate(place) if isinstance(field[2], list)]:
        if rng.random() < 0.3:
            break
        place = place[rng.choice(nested)][2]
    if place:
        _change_field(rng, place)
    return _encoded(fields)


def _flip(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _insert(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    place = rng.randint(0, len(data))
    return data[:place] + rng.randbytes(rng.choice((1, 1, 4, 100))) + data[place:]


def _delete(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    place = rng.randint(0, len(data))
    return data[:place] + data[place + rng.choice((1, 1, 4, 100)) :]


def _truncate(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data[: rng.randint(0, len(data))]


def _splice(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = rng.choice([data, *others])
    return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]


def _repeat(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    start = rng.randint(0, len(data))
    part = data[start : start + rng.randint(1, 64)]
    return data[:start] + part * rng.choice((1, 2, 1000)) + data[start:]


def _integer(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    width = rng.choice((1, 2, 4, 8))
    place = rng.randint(0, max(0, len(data) - width))
    value = (rng.choice(BOUNDARIES) % (1 << 8 * width)).to_bytes(width, "little")
    return data[:place] + value + data[place + width :]


def _odd_number(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    found = list(_NUMBER.finditer(data))
    if not found:
        return _insert(rng, data, others)
    match = rng.choice(found)
    return data[: match.start()] + rng.choice(ODD_NUMBERS).encode() + data[match.end() :]


_BYTE_MUTATIONS: tuple[Mutation, ...] = (
    *(_flip, _insert, _delete, _truncate, _splice, _repeat, _integer, _odd_number),
)


class Pairs(list[Any]):
    """A JSON object as [key, value] pairs, so that a key may come twice."""


class Token(str):
    """Text that stands in the JSON as it is."""

    __slots__ = ()


def _parsed(data: bytes) -> Any:
    """The tree of a JSON text of objects and lists; None where it is none."""
    try:
        tree = json.loads(
            data, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)), parse_int=Token
        )
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, list) else None


def _written(value: Any) -> bytes:
    return _text(value).encode("utf-8", "surrogatepass")


def _text(value: Any) -> str:
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{_text(key)}: {_text(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(value) if isinstance(value, Token) else json.dumps(value)


def _places(tree: Any, kind: type) -> list[tuple[list[Any], int]]:
    """Where values of a kind stand: (list, index) pairs; the key of a pair is no value."""
    found, open_lists = [], [tree]
    while open_lists:
        holder = open_lists.pop()
        pairs = isinstance(holder, Pairs)
        for index, item in enumerate(holder):
            place = (item, 1) if pairs else (holder, index)
            value = place[0][place[1]]
            found += [place] if isinstance(value, kind) else []
            open_lists += [value] if isinstance(value, list) else []
    return found


def _odd_value(rng: Random) -> Any:
    depth = rng.choice(_DEPTHS)
    return rng.choice(
        (
            lambda: Token(rng.choice(ODD_NUMBERS)),
            lambda: Token(rng.choice(ODD_NUMBERS)),
            lambda: rng.choice(ODD_TEXTS),
            lambda: rng.choice((None, True, False, 0.5, [], Pairs(), Token('"\\ud800"'))),
            lambda: [Token(rng.choice(ODD_NUMBERS)) for _ in range(rng.choice((1, 2, 9, 3000)))],
            lambda: Pairs([[rng.choice(ODD_TEXTS), None]]),
            lambda: Token("[" * depth + "]" * depth),
            lambda: Token('{"a":' * depth + "1" + "}" * depth),
        )
    )()


def _replace_value(rng: Random, root: list[Any]) -> bytes:
    holder, index = rng.choice(_places(root, object))
    holder[index] = _odd_value(rng)
    return _written(root[0])


def _swap_values(rng: Random, root: list[Any]) -> bytes:
    places = _places(root[0], object) or [(root, 0)]
    (one, i), (other, j) = rng.choice(places), rng.choice(places)
    first, second = _text(one[i]), _text(other[j])
    one[i], other[j] = Token(second), Token(first)
    return _written(root[0])


def _change_list(rng: Random, root: list[Any]) -> bytes:
    """Other order, other length, other sizes: what may still be a valid shape or a valid plan."""
    holder, index = rng.choice(_places(root, list))
    values = holder[index]
    changes: list[Callable[[], object]] = [lambda: rng.shuffle(values), values.clear]
    if values:
        changes += [
            lambda: values.pop(rng.randrange(len(values))),
            lambda: values.append(rng.choice(values)),
        ]
    if not isinstance(values, Pairs):
        new = Token(rng.choice(("0", "1", "1", "2", "4")))
        changes += [lambda: values.insert(rng.randint(0, len(values)), new)] * 2
    rng.choice(changes)()
    return _written(root[0])


def _change_key(rng: Random, root: list[Any]) -> bytes:
    objects = [holder[index] for holder, index in _places(root, Pairs) if holder[index]]
    if not objects:
        return _replace_value(rng, root)
    pairs = rng.choice(objects)
    pair = rng.choice(pairs)
    rng.choice(
        (
            lambda: pairs.remove(pair),
            lambda: pairs.append([pair[0], _odd_value(rng)]),
            lambda: pair.__setitem__(0, rng.choice(ODD_TEXTS)),
            lambda: pairs.append([rng.choice(ODD_TEXTS), _odd_value(rng)]),
            lambda: pair.__setitem__(0, rng.choice(rng.choice(objects))[0]),
        )
    )()
    return _written(root[0])


_TREE_MUTATIONS: tuple[Callable[[Random, list[Any]], bytes], ...] = (
    *(_replace_value, _replace_value, _swap_values, _change_list, _change_key),
)

# A field is [number, wire type, value]; the value of a length-delimited one is bytes, or the list
# of its fields where it can be read as a message.
_Field = list[Any]
_DELIMITED, _FIXED = 2, {1: 8, 5: 4}


def _fields(data: bytes) -> list[_Field] | None:
    found: list[_Field] = []
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if not number or at > len(data):
            return None
        if wire == 0:
            value: Any
            value, at = _varint(data, at)
        elif wire == _DELIMITED:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
            value = _fields(value) or value
        elif wire in _FIXED:
            value, at = data[at : at + _FIXED[wire]], at + _FIXED[wire]
        else:
            return None
        found.append([number, wire, value])
    return found if at == len(data) else None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends, past the end of the data where it is cut off."""
    value = shift = 0
    while at < len(data) and shift < 70:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at
    return 0, len(data) + 1


def _encoded(fields: Sequence[_Field]) -> bytes:
    out = bytearray()
    for number, wire, value in fields:
        out += _as_varint(number << 3 | wire)
        if wire == 0:
            out += _as_varint(value)
        else:
            content = _encoded(value) if isinstance(value, list) else value
            out += (_as_varint(len(content)) if wire == _DELIMITED else b"") + content
    return bytes(out)


def _as_varint(value: int) -> bytes:
    out = bytearray()
    value %= 1 << 64
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _change_field(rng: Random, fields: list[_Field]) -> None:
    index = rng.randrange(len(fields))
    field = fields[index]
    kind = rng.random()
    if kind < 0.1:
        del fields[index]
    elif kind < 0.2:
        fields.insert(index, list(field))
    elif kind < 0.25:
        field[0] = rng.randint(1, 30)
    elif kind < 0.3:
        fields[index] = [field[0], 0, rng.choice(BOUNDARIES)]
    elif field[1] == 0:
        field[2] = rng.choice((*BOUNDARIES, *range(24)))
    elif field[1] in _FIXED or rng.random() < 0.5:
        plain = _encoded(field[2]) if isinstance(field[2], list) else field[2]
        changed = damage_bytes(rng, plain, ())
        field[2] = changed[: len(plain)].ljust(len(plain), b"\0") if field[1] in _FIXED else changed
    else:
        field[2] = rng.choice(ODD_TEXTS).encode("utf-8", "surrogatepass")
