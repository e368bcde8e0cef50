"""Imports go down the rooms of the house, and nowhere in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "spp_export": ROOT,
    "spp_cli": ROOT / "cli",
    "spp_kernels": ROOT / "kernels",
    "spp_bench": ROOT / "benchmarks",
    "spp_campaigns": ROOT / "benchmarks",
}
# From the top down: a room imports itself and those after it.
DOWN = (
    "commands formats evaluation slicing planning domains importance calibration data models common"
)
ROOMS = DOWN.split()
PACKAGES = {"spp_cli": 4, "spp_campaigns": 3, "spp_bench": 2, "spp_export": 1, "spp_kernels": 0}


def sources() -> dict[str, Path]:
    """Dotted name and file of every module."""
    found = {}
    for package, root in FOLDERS.items():
        for path in (root / package).rglob("*.py"):
            found[".".join(path.relative_to(root).with_suffix("").parts)] = path
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


SOURCES = sources()


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


def test_rooms_are_the_entries_at_the_root() -> None:
    entries = {path.name for path in (ROOT / "spp_export").iterdir() if path.name != "__pycache__"}
    assert entries == {*ROOMS, "__init__.py", "py.typed"}


def test_imports_go_down() -> None:
    rank = {room: place for place, room in enumerate(ROOMS)}
    for name, others in IMPORTED.items():
        package, _, rest = name.partition(".")
        for other in others:
            where, _, inside = other.partition(".")
            # The table of contents names a command of the benchmarks, and imports it when used.
            down = PACKAGES[where] <= PACKAGES[package] or name == "spp_export"
            assert down, f"{name} imports {other}"
            if package == where == "spp_export" and rest:
                own, below = rest.split(".")[0], inside.split(".")[0]
                assert inside, f"{name} imports the whole of spp_export"
                assert rank[below] >= rank[own], f"{name} imports {other}, a room above"


def test_no_circle() -> None:
    """Modules, the table of contents aside, can be sorted by what they import."""
    TopologicalSorter({n: IMPORTED[n] for n in IMPORTED if n != "spp_export"}).prepare()
