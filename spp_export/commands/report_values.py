"""Values of JSON that nobody has checked, for a page that shows what it can: None for the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def number(value: Any) -> float | None:
    """A finite number; a flag is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def text(value: Any) -> str:
    """A string, or a number as one; else nothing."""
    if isinstance(value, str):
        return value
    found = number(value)
    return "" if found is None else f"{found:g}"


def mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object; an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def objects(value: Any) -> list[Mapping[str, Any]]:
    """The JSON objects of a list."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def pairs(value: Any) -> str:
    """An object's scalars in a line: keep 0.8, kind parameters."""
    found = ((name, text(item)) for name, item in mapping(value).items())
    return ", ".join(f"{name} {item}" for name, item in found if item)
