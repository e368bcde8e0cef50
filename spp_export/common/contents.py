"""A package's table of contents: names that are imported when they are first used.

The list stands once, in the block that type checkers read:

    if TYPE_CHECKING:
        from package.module import name as name
    __getattr__, __dir__ = contents(__name__, __file__)

A package on a floor above adds a name by an entry point in the group of this package's name, so
that no import goes upwards: `spp_bench` adds `bench` to `spp_export` so.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


def contents(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package, by the imports in its TYPE_CHECKING block and by
    the entry points of its name."""
    inside = {
        alias.asname or alias.name: (node.module, alias.name)
        for block in ast.parse(Path(file).read_text(encoding="utf-8")).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }

    @cache
    def names() -> dict[str, tuple[str, str]]:
        from importlib.metadata import entry_points  # not needed by what is inside

        return inside | {
            added.name: (added.module, added.attr) for added in entry_points(group=package)
        }

    def get(name: str) -> Any:
        if name == "__all__":
            return sorted(names())
        where = inside.get(name) or (None if name.startswith("_") else names().get(name))
        if where is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = where
        return getattr(import_module(module), attribute)

    return get, lambda: sorted(names())
