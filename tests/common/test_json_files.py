"""Strict reading of untrusted JSON, and writing that is the same every time."""

from __future__ import annotations

import json
import os

import pytest

from spp_export.common.errors import PlanError, SppError
from spp_export.common.json_files import dump_json, parse_json, read_bytes, read_json


def read(tmp_path, data, **options):
    path = tmp_path / "value.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_json(path, what="plan", error=PlanError, **options)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        " [1, -2.5e3, true, null]\r\n",
        '{"a": {"b": [[]]}, "c": "]}\\"{["}',
        '"\\ud83d\\ude00"',
    ],
)
def test_reads_what_the_standard_library_reads(tmp_path, text):
    assert read(tmp_path, text) == json.loads(text)


def test_a_byte_order_mark_is_accepted(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbf[1]") == [1]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "is empty, expected JSON"),
        (b"nothing", r"not valid JSON at line 1, column 1"),
        (b'{"a": 1,\n "b" 2}', r"line 2, column 6"),
        (b"[1] 2", "Extra data"),
        (b'["\x01"]', "Invalid control character"),
        (b'["\xff"]', "not UTF-8, byte 0xff at offset 2"),
        (b"[NaN]", "NaN is not a finite number"),
        (b"[-Infinity]", "-Infinity is not a finite number"),
        (b"[1e999]", "1e999 is not a finite number"),
        (b'{"a": {"k": 1, "k": 1}}', "the key 'k' appears twice"),
        (b'["\\ud800"]', "half of a surrogate pair"),
        (b"9" * 5000, "limit"),
        (b"[" * 100_000, "nested deeper than 64 levels"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64 levels"),
    ],
)
def test_refuses_in_one_line(tmp_path, data, match):
    with pytest.raises(PlanError, match=match) as caught:
        read(tmp_path, data)
    assert str(caught.value).startswith(f"plan {tmp_path}/value.json: ")
    assert "\n" not in str(caught.value)


def test_depth_is_counted_outside_strings_only(tmp_path):
    deepest = "[" * 64 + "]" * 64
    assert read(tmp_path, deepest)
    assert read(tmp_path, json.dumps(["[" * 1000, '"[' * 1000, "\\" * 999 + "["]))
    with pytest.raises(SppError, match="deeper than 3"):
        parse_json("[[[[]]]]", what="x", max_depth=3)


@pytest.mark.parametrize(
    "text", ['"\\"' * 1_000_000, '"' + "\\" * 3_000_001, '["' + "[" * 3_000_000]
)
def test_hostile_strings_take_linear_time(text):
    """In quadratic time each of these would take hours, and meet the guard against deadlock."""
    with pytest.raises(SppError, match="not valid JSON"):
        parse_json(text, what="x")


def test_size_limit(tmp_path):
    assert read(tmp_path, b"[1, 2]", max_bytes=6) == [1, 2]
    with pytest.raises(PlanError, match="larger than 5 bytes"):
        read(tmp_path, b"[1, 2]", max_bytes=5)
    with open(tmp_path / "value.json", "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(PlanError, match="larger than 16 MiB"):
        read_json(tmp_path / "value.json", what="plan", error=PlanError)


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("absent.json", "no such file"),
        (".", "got a directory"),
        ("value\0.json", "cannot be read"),
        ("/dev/null", "got a device"),
    ],
)
def test_paths_that_are_no_file(tmp_path, path, match):
    with pytest.raises(PlanError, match=match):
        read_json(tmp_path / path, what="plan", error=PlanError)


def test_a_pipe_can_be_read():
    reader, writer = os.pipe()
    os.write(writer, b"[3]")
    os.close(writer)
    try:
        assert read_bytes(f"/dev/fd/{reader}", what="x", max_bytes=9) == b"[3]"
    finally:
        os.close(reader)


def test_written_json_is_compact_where_it_is_flat():
    value = {
        "name": "säure",
        "layers": [{"kv_heads": [0, 2], "channels": None}, {"kv_heads": [], "channels": [1]}],
        "pairs": ((0, 1), (2, 3)),
        "empty": {},
        "nothing": [],
        "share": 0.1,
    }
    assert dump_json(value) == (
        "{\n"
        '  "name": "säure",\n'
        '  "layers": [\n'
        "    {\n"
        '      "kv_heads": [0, 2],\n'
        '      "channels": null\n'
        "    },\n"
        "    {\n"
        '      "kv_heads": [],\n'
        '      "channels": [1]\n'
        "    }\n"
        "  ],\n"
        '  "pairs": [[0, 1], [2, 3]],\n'
        '  "empty": {},\n'
        '  "nothing": [],\n'
        '  "share": 0.1\n'
        "}\n"
    )


def test_written_json_reads_back():
    value = {"long": [[i, i] for i in range(60)], "text": 'a"b\\c\n\t\u2028', "n": [1.5, -2, None]}
    assert json.loads(dump_json(value)) == value
    assert list(json.loads(dump_json({"b": 1, "a": 2}))) == ["b", "a"]
    with pytest.raises(ValueError, match="JSON compliant"):
        dump_json([float("nan")])
