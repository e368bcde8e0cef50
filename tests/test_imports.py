"""Imports go down the floors of the house, and nowhere in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the top down: a floor imports itself and those after it. The middle ones are rooms.
DOWN = (
    "commands formats evaluation slicing planning domains importance calibration data models common"
)
ROOMS = DOWN.split()
FLOORS = ["spp_cli", "spp_campaigns", "spp_bench", "__main__", "spp_export", *ROOMS, "spp_kernels"]
SOURCES = {
    ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in (ROOT, ROOT / "cli", ROOT / "benchmarks", ROOT / "kernels")
    for path in folder.glob("spp_*/**/*.py")
}


def imported(path: Path) -> set[str]:
    """Our modules that a file imports anywhere in it, also lazily and for type checkers."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inside & SOURCES.keys()) or {node.module}
    return names & SOURCES.keys()


IMPORTED = {name: imported(path) for name, path in SOURCES.items()}


def floor(name: str) -> int:
    """How far down a module is."""
    package, _, rest = name.partition(".")
    return FLOORS.index(rest.split(".")[0] if package == "spp_export" and rest else package)


def test_rooms_are_the_entries_at_the_root() -> None:
    entries = {path.name for path in (ROOT / "spp_export").iterdir() if path.name != "__pycache__"}
    assert entries == {*ROOMS, "__init__.py", "__main__.py", "py.typed"}


def test_imports_go_down() -> None:
    up = [(name, x) for name, xs in IMPORTED.items() for x in xs if floor(x) < floor(name)]
    assert up == []


def test_no_circle() -> None:
    TopologicalSorter(IMPORTED).prepare()
