"""Lines over an axis: quality over budgets, speed and memory over context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from spp_export.commands.report.page.figures import figure
from spp_export.commands.report.page.markup import Html, joined, tag
from spp_export.commands.report.page.record import Chart, Point, Series
from spp_export.commands.report.page.scales import Scale, place_scale, value_scale

# Narrow, so that letters stay legible where a telephone shrinks it.
_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 12, 44
HUES = 6
# More of them would lie on each other.
_MOST_BANDS = 2


def chart_figure(chart: Chart, name: str) -> Html:
    """The chart with its title and legend; `name` is an id that no other has."""
    unit = tag("p", chart.y_label, class_="unit")
    title = tag("figcaption", tag("h3", chart.title), unit)
    return tag("figure", title, _picture(chart, name), _legend(chart), class_="chart")


def _picture(chart: Chart, name: str) -> Html:
    x, y = _scales(chart)
    frame = {"x": _LEFT, "y": _TOP, "width": _WIDTH - _LEFT - _RIGHT}
    frame["height"] = _HEIGHT - _TOP - _BOTTOM
    clip = tag("clipPath", tag("rect", **frame), id=f"{name}-inside")
    bands = sum(one.style == "main" for one in chart.series) <= _MOST_BANDS
    lines = tag(
        "g", *(_line(one, x, y, bands) for one in _ordered(chart)), clip_path=f"url(#{name}-inside)"
    )
    dots = [_dots(chart, one, x, y, first=not index) for index, one in enumerate(_dotted(chart))]
    return tag(
        "svg",
        tag("defs", clip),
        _grid(chart, x, y),
        lines,
        joined(dots),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="grid",
        aria_label=f"{chart.title}: {chart.y_label} over {chart.x_label}. Arrow keys move.",
        class_="marks lines",
    )


def _scales(chart: Chart) -> tuple[Scale, Scale]:
    points = [point for one in chart.series for point in one.points]
    level = [] if chart.level is None else [chart.level]
    mark = [] if chart.mark is None else [chart.mark[0]]
    values = [value for point in points for value in _spread(point)] + level
    if chart.cut is not None:
        values = [min(value, chart.cut) for value in values]
    places = [point.x for point in points]
    x = place_scale(places, _LEFT + 12, _WIDTH - _RIGHT - 12, log=chart.log_x)
    if mark and not x.low <= mark[0] <= x.high:
        x = place_scale([*places, *mark], x.start, x.end, log=chart.log_x)
    ratio = chart.level is not None
    y = value_scale(values, _HEIGHT - _BOTTOM, _TOP, zero=not ratio, ratio=ratio)
    return x, y


def _spread(point: Point) -> tuple[float, ...]:
    return tuple(v for v in (point.y, point.low, point.high) if v is not None)


def _grid(chart: Chart, x: Scale, y: Scale) -> Html:
    parts = []
    for value in y.ticks:
        at = round(y(value), 1)
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(_text(f"{value:,g}", _LEFT - 7, at + 4, "end"))
    for value in _thinned(x):
        at = round(x(value), 1)
        parts.append(tag("line", x1=at, x2=at, y1=_HEIGHT - _BOTTOM, y2=_HEIGHT - _BOTTOM + 4))
        parts.append(_text(f"{value:g}", at, _HEIGHT - _BOTTOM + 18, "middle"))
    if chart.level is not None:
        at = round(y(chart.level), 1)
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="level"))
    if chart.mark:
        at = round(x(chart.mark[0]), 1)
        parts.append(tag("line", x1=at, x2=at, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="mark"))
        side, anchor = (-5, "end") if at > _WIDTH / 2 else (5, "start")
        parts.append(_text(chart.mark[1], at + side, _TOP + 10, anchor))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(_text(chart.x_label, middle, _HEIGHT - 6, "middle", "axis name"))
    return tag("g", *parts, aria_hidden="true")


def _thinned(x: Scale) -> list[float]:
    """Ticks whose numbers have room beside each other."""
    kept: list[float] = []
    for value in x.ticks:
        if not kept or x(value) - x(kept[-1]) >= 28:
            kept.append(value)
    return kept


def _ordered(chart: Chart) -> list[Series]:
    """What matters last, so that it lies on top."""
    depth = {"faint": 0, "other": 1, "bound": 2, "main": 3}
    return sorted(chart.series, key=lambda one: depth[one.style])


def _dotted(chart: Chart) -> list[Series]:
    """The series with those of their points that are drawn."""
    most = math.inf if chart.cut is None else chart.cut
    shown = (
        replace(one, points=tuple(p for p in one.points if p.y <= most)) for one in chart.series
    )
    return [one for one in shown if one.points]


def _line(series: Series, x: Scale, y: Scale, bands: bool) -> Html:
    if not series.points:
        return Html()
    path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in series.points)
    line = tag("polyline", points=path, class_=f"{_hue(series)} {series.style}")
    spread = [p for p in series.points if p.low is not None and p.high is not None]
    if not bands or series.style != "main" or len(spread) < 2:
        return line
    upper = [f"{x(p.x):.1f},{y(p.high or p.y):.1f}" for p in spread]
    lower = [f"{x(p.x):.1f},{y(p.low or p.y):.1f}" for p in reversed(spread)]
    band = tag("polygon", points=" ".join(upper + lower), class_=f"{_hue(series)} band")
    return joined([band, line])


def _dots(chart: Chart, series: Series, x: Scale, y: Scale, *, first: bool) -> Html:
    """The points of a series, each with its name; the first of all takes the focus."""
    radius = {"main": 4, "faint": 2.5}.get(series.style, 3)
    dots = [
        tag(
            "circle",
            tag("title", _title(chart, series, point)),
            cx=round(x(point.x), 1),
            cy=round(y(point.y), 1),
            r=radius,
            class_=f"{_hue(series)} dot {series.style}",
            role="gridcell",
            tabindex="0" if first and not index else "-1",
        )
        for index, point in enumerate(series.points)
    ]
    return tag("g", *dots, role="row", aria_label=series.label)


def _title(chart: Chart, series: Series, point: Point) -> str:
    lines = [series.label, f"{point.x:g}{chart.x_unit}: {figure(point.y, 4)}{chart.unit}"]
    if point.low is not None and point.high is not None and point.low != point.high:
        lines.append(f"from {figure(point.low, 4)} to {figure(point.high, 4)}")
    return "\n".join(lines)


def _legend(chart: Chart) -> Html:
    named = (one for one in chart.series if one.style in ("main", "other"))
    items = [tag("li", _swatch(one), one.label) for one in named]
    if chart.dashed:
        items.append(tag("li", _swatch(Series("", (), "bound", None)), chart.dashed))
    faint = [one for one in chart.series if one.style == "faint"]
    if faint:
        items.append(tag("li", _swatch(faint[0]), f"{len(faint)} others, named on hover"))
    return tag("ul", *items, class_="legend")


def _swatch(series: Series) -> Html:
    line = tag("line", x1="1", x2="25", y1="6", y2="6", class_=f"{_hue(series)} {series.style}")
    parts: Sequence[Html] = [line]
    if series.style != "bound":
        parts = [line, tag("circle", cx="13", cy="6", r="3", class_=f"{_hue(series)} dot")]
    return tag("svg", *parts, class_="swatch lines", viewBox="0 0 26 12", aria_hidden="true")


def _hue(series: Series) -> str:
    return "plain" if series.hue is None else f"hue{series.hue % HUES}"


def _text(text: str, x: float, y: float, anchor: str, class_: str = "axis") -> Html:
    return tag("text", text, x=x, y=round(y, 1), text_anchor=anchor, class_=class_)
