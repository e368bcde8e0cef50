"""The table of faults names tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "README.md"
_NAMED = re.compile(r"`(tests/[^`:]+\.py)(?:::(\w+))?`")


def rows() -> list[tuple[str, str, str]]:
    """(fault, promise, tests) of every line of the tables."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    # A pipe within a cell would be escaped.
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("| ")]
    found = [tuple(cell.strip() for cell in row) for row in cells]
    assert all(len(row) == 3 for row in found)
    return [row for row in found if row != ("fault", "promise", "test")]


@cache
def functions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_every_fault_has_a_promise_and_tests_that_exist(row):
    fault, promise, tests = row
    assert fault
    assert promise
    named = _NAMED.findall(tests)
    assert named
    assert _NAMED.sub("", tests).strip(" ,") == "", "only tests belong in the third column"
    for file, function in named:
        path = ROOT / file
        assert path.is_file(), file
        if path.name.startswith("test_"):
            assert function.startswith("test_"), f"{file}: name the test"
        assert not function or function in functions(path), f"{file}::{function}"


def test_no_fault_is_listed_twice():
    faults = [fault for fault, _, _ in rows()]
    assert len(faults) == len(set(faults)) > 40
