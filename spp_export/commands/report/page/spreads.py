"""Measured ratios as dots with their spread, beside the bound of each, on one common axis."""

from __future__ import annotations

from collections.abc import Sequence

from spp_export.commands.report.page.figures import times
from spp_export.commands.report.page.markup import Html, tag
from spp_export.commands.report.page.record import Spread
from spp_export.commands.report.page.scales import Scale, value_scale

_MIDDLE = 14


def spread_figure(title: str, spreads: Sequence[Spread]) -> Html:
    """A row per ratio; the line at 1 is the dense model."""
    values = [value for one in spreads for value in (one.low, one.high, one.value, one.bound)]
    scale = value_scale([*values, 1.0], 2, 98, zero=False, ratio=False)
    rows = [_row(one, scale) for one in spreads]
    body = tag("ul", *rows, class_="bars spreads")
    ends = tag("p", f"Axis from {times(scale.low)} to {times(scale.high)}.", class_="unit")
    caption = tag("figcaption", tag("h3", title))
    return tag("figure", caption, body, ends, class_="chart")


def _row(one: Spread, scale: Scale) -> Html:
    text = (
        f"{one.label}\n{times(one.value, 4)}, from {times(one.low, 4)} to "
        f"{times(one.high, 4)}\nbound {times(one.bound, 4)}"
    )
    value = tag("span", tag("b", times(one.value)), f" of {times(one.bound)}")
    note = tag("small", one.note) if one.note else ""
    return tag(
        "li",
        tag("span", one.label, note, class_="name"),
        tag(
            "svg",
            tag("title", text),
            _line("level", scale(1.0), 2, 26),
            tag(
                "line",
                x1=_at(scale(one.low)),
                x2=_at(scale(one.high)),
                y1=_MIDDLE,
                y2=_MIDDLE,
                class_="hue0 whisker",
            ),
            _line("limit", scale(one.bound), 5, 23),
            tag("circle", cx=_at(scale(one.value)), cy=_MIDDLE, r="5", class_="hue0 dot"),
            class_="bar marks lines",
            height="28",
            width="100%",
            role="img",
            tabindex="0",
        ),
        tag("span", value, class_="value"),
    )


def spread_legend() -> Html:
    """What the marks of all these figures mean."""
    size = {"class_": "swatch lines", "viewBox": "0 0 26 16", "aria_hidden": "true"}
    line = tag("line", x1="3", x2="23", y1="8", y2="8", class_="hue0 whisker")
    dot = tag("svg", line, tag("circle", cx="13", cy="8", r="4", class_="hue0 dot"), **size)
    limit = tag("svg", _line("limit", 50, 1, 15), **size)
    level = tag("svg", _line("level", 50, 1, 15), **size)
    return tag(
        "ul",
        tag("li", dot, "median, 20th to 80th percentile"),
        tag("li", limit, "bound: the best possible"),
        tag("li", level, f"{times(1.0)}: the dense model"),
        class_="legend",
    )


def _line(class_: str, at: float, top: float, bottom: float) -> Html:
    return tag("line", x1=_at(at), x2=_at(at), y1=top, y2=bottom, class_=class_)


def _at(share: float) -> str:
    return f"{share:.2f}%"
