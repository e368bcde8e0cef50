"""The next command, ready to be pasted into a shell."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spp_export import PlanRequest


def command_line(*words: object, **flags: Any) -> str:
    """`spp` with these words and those flags that have a value."""
    parts = ["spp", *(str(word) for word in words)]
    for name, value in flags.items():
        word = name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{word}" if value else f"--no-{word}")
        elif value is not None:
            parts += [f"--{word}", str(value)]
    return shlex.join(parts)


def asked(request: PlanRequest) -> dict[str, Any]:
    """What a request asks beyond the defaults, as flags."""
    return {
        field.name: getattr(request, field.name)
        for field in fields(request)
        if getattr(request, field.name) != field.default
    }


def given(model: str) -> str | None:
    """A model's name, unless it is the one that commands take by default."""
    return None if model == "demo" else model
