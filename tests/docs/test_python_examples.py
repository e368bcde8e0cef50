"""Calls of `spp_export` in pages and examples have arguments that the functions take."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import spp_export

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SOURCES = {
    **{page: "\n".join(FENCE.findall((ROOT / page).read_text(encoding="utf-8"))) for page in PAGES},
    **{
        path.name: path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "examples").glob("*.py"))
    },
}
CALLS = [
    (source, node.func.attr, node)
    for source, text in SOURCES.items()
    for node in ast.walk(ast.parse(text))
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Attribute)
    and isinstance(node.func.value, ast.Name)
    and node.func.value.id == "spp_export"
]


@pytest.mark.parametrize(
    ("name", "call"),
    [pytest.param(name, call, id=f"{source}:{call.lineno}") for source, name, call in CALLS],
)
def test_a_call_fits_its_function(name: str, call: ast.Call) -> None:
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    inspect.signature(getattr(spp_export, name)).bind(*call.args, **keywords)


def test_there_are_calls() -> None:
    assert {name for _, name, _ in CALLS} >= {"export", "plan", "load_many"}
