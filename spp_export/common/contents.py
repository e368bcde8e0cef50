"""A package's table of contents: names that are imported when they are first used.

The list stands once, in the block that type checkers read:

    if TYPE_CHECKING:
        from package.module import name as name
    __getattr__, __dir__, __all__ = contents(__name__, __file__)
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def contents(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], Any]:
    """`__getattr__`, `__dir__` and `__all__` of a package, by the imports in its TYPE_CHECKING
    block."""
    where = {
        alias.asname or alias.name: (node.module, alias.name)
        for block in ast.parse(Path(file).read_text(encoding="utf-8")).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = where[name]
        return getattr(import_module(module), attribute)

    return get, lambda: sorted(where), sorted(where)
