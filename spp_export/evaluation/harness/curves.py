"""Curves: perplexity over the dense model's against the share removed, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spp_export.common.errors import UsageError
from spp_export.evaluation.harness.bootstrap import Interval
from spp_export.evaluation.harness.records import Results
from spp_export.evaluation.harness.rows import Row
from spp_export.evaluation.harness.table import ranking, units_name

_WIDTH, _HEIGHT = 5.5, 4.2
_LEGEND_WIDTH = 2.6
# Ruinous choices would press all others to the bottom: the axis is logarithmic, and ends here.
_LOG_ABOVE, _CUT = 2.0, 6.0
_ORDER = ("method", "dynamic", "ablation", "control")
_DASHED = {"control": "--", "ablation": ":", "dynamic": "-."}


@dataclass(frozen=True)
class Curve:
    """One way of choosing over budgets: (share removed, ratio), by share."""

    label: str
    kind: str
    points: tuple[tuple[float, Interval], ...]


def curves(results: Results) -> dict[tuple[str, str], list[Curve]]:
    """Curves by (units, compensation) on the text that judges, methods first, the best of the
    largest share removed before others.

    What can have no compensation stands in every panel of its units. Where some are measured at
    several budgets, those at a single one are left to the table.
    """
    text = results.judge
    points: dict[Row, list[tuple[float, Interval]]] = {}
    for (keep, _), rows in ranking(results).items():
        for ranked in rows:
            if ranked.row.kind != "dense":
                way = replace(ranked.row, keep=1.0)
                points.setdefault(way, []).append((1 - keep, ranked.ratio[text]))
    if any(len(found) > 1 for found in points.values()):
        points = {way: found for way, found in points.items() if len(found) > 1}
    panels: dict[tuple[str, str], list[Curve]] = {}
    for way in points:
        if way.kind != "dynamic":
            panels.setdefault((way.units, way.compensation), [])
    for way, found in points.items():
        curve = Curve(way.label, way.kind, tuple(sorted(found, key=lambda point: point[0])))
        for units, compensation in panels:
            alike = way.compensation == compensation or way.kind == "dynamic"
            if way.units == units and alike:
                panels[units, compensation].append(curve)
    return {
        key: sorted(panel, key=lambda curve: (_ORDER.index(curve.kind), curve.points[-1][1].value))
        for key, panel in sorted(panels.items())
    }


def write_curves(results: Results, path: Path) -> bool:
    """Draw the curves to a PNG; False where there is nothing to draw.

    Raises UsageError where matplotlib is not installed.
    """
    check_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = curves(results)
    if not panels:
        return False
    units = sorted({key[0] for key in panels}, reverse=True)
    compensations = sorted({key[1] for key in panels})
    size = (_WIDTH * len(units) + _LEGEND_WIDTH, _HEIGHT * len(compensations))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(compensations), len(units), squeeze=False)
    styles = _styles(panels)
    handles: dict[str, Any] = {}
    for row, compensation in enumerate(compensations):
        for column, unit in enumerate(units):
            axes = grid[row][column]
            axes.set_title(f"{units_name(unit)}, compensation {compensation}")
            for curve in panels.get((unit, compensation), ()):
                handles.setdefault(curve.label, _draw(axes, curve, styles[curve.label]))
            _finish(axes, panels.get((unit, compensation), []))
    figure.suptitle(f"{results.header['model']['name']}: {results.judge}")
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="small")
    # Without the version of matplotlib, so that equal results give equal files.
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
    return True


def check_plots() -> None:
    """UsageError where matplotlib, which an extra brings, is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "curves are drawn by matplotlib, which is not installed. "
            "Install it with: pip install 'spp-export[plots]', or use --no-curves."
        ) from None


def _styles(panels: dict[tuple[str, str], list[Curve]]) -> dict[str, dict[str, Any]]:
    """A colour per label, the same in every panel; shades of grey for controls."""
    methods = dict.fromkeys(c.label for p in panels.values() for c in p if c.kind != "control")
    controls = dict.fromkeys(c.label for p in panels.values() for c in p if c.kind == "control")
    kinds = {curve.label: curve.kind for panel in panels.values() for curve in panel}
    colours = {label: f"C{index % 10}" for index, label in enumerate(methods)}
    colours |= {
        label: str(0.15 + 0.55 * index / max(len(controls), 1))
        for index, label in enumerate(controls)
    }
    marks = "osD^vP*X"
    return {
        label: {
            "color": colour,
            "linestyle": _DASHED.get(kinds[label], "-"),
            "marker": marks[(index // 10 if kinds[label] != "control" else index) % len(marks)],
            "linewidth": 1.0 if kinds[label] == "control" else 1.6,
        }
        for index, (label, colour) in enumerate(colours.items())
    }


def _draw(axes: Any, curve: Curve, style: dict[str, Any]) -> Any:
    points = [(share, found) for share, found in curve.points if math.isfinite(found.value)]
    shares = [100 * share for share, _ in points]
    (line,) = axes.plot(shares, [found.value for _, found in points], markersize=4, **style)
    low, high = [found.low for _, found in points], [found.high for _, found in points]
    if curve.kind == "control":
        return line  # bands of a dozen curves hide each other; the table has these
    if len(points) > 1:
        axes.fill_between(shares, low, high, color=style["color"], alpha=0.12, linewidth=0)
    elif points:
        axes.vlines(shares, low, high, color=style["color"], linewidth=1)
    return line


def _finish(axes: Any, panel: list[Curve]) -> None:
    shares = {round(100 * share, 1) for curve in panel for share, _ in curve.points}
    axes.set_xticks(sorted(shares))
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    axes.set_xlabel("parameters of these units removed, %")
    axes.set_ylabel("perplexity over dense")
    if max(_values(panel), default=1.0) > _LOG_ABOVE:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:.3g}")
        axes.tick_params(axis="y", which="minor", labelsize="x-small")
        if max(_values(panel)) > _CUT:
            axes.set_ylim(0.95 * min(1.0, *_values(panel)), _CUT)
    axes.grid(alpha=0.25, which="both")


def _values(panel: list[Curve]) -> Iterator[float]:
    for curve in panel:
        yield from (found.value for _, found in curve.points if math.isfinite(found.value))
