"""Figures by matplotlib in one style; equal data give equal files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

LEVEL = "0.6"
# Beyond this factor between its ends, an axis of ratios is logarithmic.
_LOG_ABOVE = 2.0


class Point(NamedTuple):
    """A place on a plot; `low` and `high` bound `y` where its spread is known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """Points joined by a line; `band` draws their spread around it.

    highest: points above it have no marker. group: the id of its markers in an SVG.
    """

    label: str
    points: Sequence[Point]
    colour: str
    width: float = 1.6
    dash: str = "-"
    marker: str = "o"
    size: float = 4.0
    face: str | None = None
    band: bool = True
    highest: float = math.inf
    group: str | None = None


def plot_style(**style: Any) -> AbstractContextManager[None]:
    """matplotlib's own defaults, whatever a user has set, with `style` over them."""
    from matplotlib import style as styles

    ours = {"axes.grid": True, "grid.color": "0.9", "legend.fontsize": "small"}
    return styles.context(["default", ours | style])


def new_figure(rows: int, columns: int, width: float, height: float, **style: Any) -> Any:
    """A figure and its axes, [rows, columns]; sizes in inches, `style` as in matplotlib's rc."""
    from matplotlib.figure import Figure

    with plot_style(**style):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)


def draw_line(axes: Any, line: Line) -> Any:
    """Draw a line with its spread; what a legend shows of it. Infinite values are left out."""
    points = [point for point in line.points if math.isfinite(point.y)]
    (artist,) = axes.plot(
        [point.x for point in points],
        [point.y for point in points],
        label=line.label,
        color=line.colour,
        linewidth=line.width,
        linestyle=line.dash,
        marker=line.marker,
        markersize=line.size,
        markerfacecolor=line.face or line.colour,
        markevery=[index for index, point in enumerate(points) if point.y <= line.highest],
        gid=line.group,
        zorder=2 + line.width / 10,
    )
    spread = [(p.x, p.low, p.high) for p in points if p.low is not None and p.high is not None]
    if line.band and spread:
        places, low, high = zip(*spread, strict=True)
        if len(spread) > 1:
            axes.fill_between(places, low, high, color=line.colour, alpha=0.12, linewidth=0)
        else:
            axes.vlines(places, low, high, color=line.colour, linewidth=1)
    return artist


def context_axis(axes: Any, contexts: Iterable[float]) -> None:
    """A logarithmic x axis of contexts in tokens, with a tick at each."""
    axes.set_xlabel("context, tokens")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(contexts)))
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")


def ratio_axis(axes: Any, values: Iterable[float], highest: float = math.inf) -> None:
    """A y axis of ratios to the dense model: logarithmic where they lie far apart, and no higher
    than `highest`."""
    axes.axhline(1.0, color=LEVEL, linewidth=0.8)
    known = [1.0, *(value for value in values if math.isfinite(value))]
    if max(known) > _LOG_ABOVE * min(known) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:.3g}")
        axes.grid(which="minor")
    if max(known) > highest:
        axes.set_ylim(0.95 * min(known), highest)


def save_png(figure: Any, path: Path) -> None:
    """Write a figure without the version of matplotlib, which would make equal data differ."""
    with plot_style():
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
