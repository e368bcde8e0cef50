"""HTML and SVG as text: whatever is not markup already is escaped, so nothing can be forgotten."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable

_LONGEST = 500
# Would let a name from a file turn the text around it: overrides and isolates of direction.
_TURNING = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Html(str):
    """Markup: text that is put into a page as it is."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: object) -> Html:
    """An element. Attributes are named with _ for -, a last _ is left out; None has no attribute,
    True one without a value."""
    inner = "".join(child if isinstance(child, Html) else escaped(child) for child in children)
    return Html(f"<{name}{_attributes(attributes)}>{inner}</{name}>")


def void(name: str, /, **attributes: object) -> Html:
    """An element of HTML that has no end tag."""
    return Html(f"<{name}{_attributes(attributes)}>")


def joined(parts: Iterable[str], between: str = "") -> Html:
    """Several pieces as one."""
    pieces = (part if isinstance(part, Html) else escaped(part) for part in parts)
    return Html(escaped(between).join(pieces))


def escaped(text: str) -> Html:
    """Text from anywhere, in at most some hundred characters, with no meaning as markup."""
    return Html(html.escape(_plain(text), quote=True))


def _plain(text: str) -> str:
    short = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return "".join(c if c == "\n" or _harmless(c) else "�" for c in short)


def _harmless(character: str) -> bool:
    return character not in _TURNING and unicodedata.category(character) not in ("Cc", "Cs")


def _attributes(attributes: dict[str, object]) -> str:
    found = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        label = name.removesuffix("_").replace("_", "-")
        found.append(f" {label}" if value is True else f' {label}="{escaped(str(value))}"')
    return "".join(found)
