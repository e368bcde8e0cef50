"""The page of `spp report`: templates and what fills them in. The page loads nothing from the
network, and its content security policy forbids it to.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from spp_export.commands.report.page import figures

if TYPE_CHECKING:
    from jinja2 import Environment

# Tells a page of ours from other files.
GENERATOR = "spp report"
_FILTERS = ("byte_size", "change", "figure", "integer", "nth", "percent", "ranges", "times")
_LONGEST = 500
# Would let a name from a file turn the text around it: overrides and isolates of direction.
_TURNING = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def render(parts: dict[str, Any]) -> str:
    """The HTML text; equal parts give equal text. Parts may hold text that nobody has checked."""
    style = resource("style.css") + parts["heads"].style
    template = _environment().get_template("report.html.j2")
    return template.render(parts, style=style, script=resource("script.js"), generator=GENERATOR)


@cache
def resource(name: str) -> str:
    """The text of a file beside this one."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(resource),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {name: getattr(figures, name) for name in _FILTERS} | {"hash": _hash}
    return environment


def plain(value: Any) -> Any:
    """Text from anywhere in at most some hundred characters that steer nothing; else the value."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    short = value if len(value) <= _LONGEST else value[: _LONGEST - 1] + "…"
    return "".join(c if c == "\n" or _harmless(c) else "\ufffd" for c in short)


def _harmless(character: str) -> bool:
    return character not in _TURNING and unicodedata.category(character) not in ("Cc", "Cs")


def _hash(text: str) -> str:
    """The hash by which a content security policy allows a text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
