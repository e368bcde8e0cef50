"""Counts, sizes and durations as people type and read them."""

from __future__ import annotations

import pytest

from spp_cli.render.look import byte_size, ranges, seconds, single_line
from spp_export.common.options import parse_count


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1500", 1500),
        ("12k", 12_000),
        ("1.5M", 1_500_000),
        ("2G", 2_000_000_000),
        ("2Gi", 2 << 30),
        ("1.5KiB", 1536),
        (" 3 m ", 3_000_000),
    ],
)
def test_counts(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize(
    "text", ["", "k", "1.5", "-3", "1e6", "12x", "0.0001k", "1,5M", "5i", "nan"]
)
def test_what_is_no_count(text):
    with pytest.raises(ValueError, match="is not a"):
        parse_count(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (538_060_032, "538.1 MB"),
        (999_960_000, "1.0 GB"),
        (5.39e10, "53.9 GB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_byte_size(count, text):
    assert byte_size(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (41.4, "41 s"), (125.2, "2 min 5 s"), (119.7, "2 min 0 s")],
)
def test_seconds(value, text):
    assert seconds(value) == text


def test_ranges():
    assert ranges([0, 3, 4, 5, 7, 8]) == "0, 3-5, 7-8"
    assert ranges([]) == ""


def test_one_line_of_hostile_text():
    assert single_line("a\n b\x1b[31m\tc\x07") == r"a b\x1b[31m c\x07"
