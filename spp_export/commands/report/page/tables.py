"""Tables and lists of facts."""

from __future__ import annotations

from collections.abc import Sequence

from spp_export.commands.report.page.markup import Html, tag
from spp_export.commands.report.page.record import Fact, Table


def figures_table(table: Table, label: str) -> Html:
    """A table that scrolls inside its own box where it is wider than the page."""
    head = [
        tag("th", name, scope="col", class_=_class(table, index))
        for index, name in enumerate(table.head)
    ]
    rows = [tag("tr", *(_cell(table, i, cell) for i, cell in enumerate(row))) for row in table.rows]
    body = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows), class_="figures")
    return tag("div", body, class_="scroll", tabindex="0", role="region", aria_label=label)


def fact_list(facts: Sequence[Fact]) -> Html:
    """Names and values, one pair a line."""
    pairs = [
        tag(
            "div",
            tag("dt", fact.name),
            tag("dd", tag("code", fact.value) if fact.code else fact.value),
        )
        for fact in facts
    ]
    return tag("dl", *pairs, class_="facts")


def unfolding(title: str, *inner: Html) -> Html:
    """What is shown when asked for."""
    return tag("details", tag("summary", title), *inner)


def _cell(table: Table, index: int, text: str) -> Html:
    if index == 0:
        return tag("th", text, scope="row", class_=_class(table, index))
    return tag("td", text, class_=_class(table, index))


def _class(table: Table, index: int) -> str | None:
    return "text" if index in table.text else None
