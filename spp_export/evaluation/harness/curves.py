"""Curves against the share removed, as a PNG: KL to the dense model where answers were judged, else
perplexity over the dense model's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spp_export.common.plots import Line, Point, draw_line, new_figure, ratio_axis, save_png
from spp_export.evaluation.bootstrap import Interval
from spp_export.evaluation.harness.records import Results
from spp_export.evaluation.harness.rows import Row
from spp_export.evaluation.harness.table import ranking, units_name

_WIDTH, _HEIGHT = 5.5, 4.2
_LEGEND_WIDTH = 2.6
# Ruinous choices would press all others to the bottom: the axis ends here.
HIGHEST = 6.0
_ORDER = ("method", "dynamic", "ablation", "control")
_DASHED = {"control": "--", "ablation": ":", "dynamic": "-."}


@dataclass(frozen=True)
class Curve:
    """One way of choosing over budgets: (share removed, figure), by share."""

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
            if not ranked.row.whole:
                way = replace(ranked.row, keep=1.0)
                figure = ranked.kl if results.on_answers else ranked.ratio[text]
                points.setdefault(way, []).append((1 - keep, figure))
    if any(len(measured) > 1 for measured in points.values()):
        points = {way: measured for way, measured in points.items() if len(measured) > 1}
    panels: dict[tuple[str, str], list[Curve]] = {}
    for way in points:
        if way.kind != "dynamic":
            panels.setdefault((way.units, way.compensation), [])
    for way, measured in points.items():
        curve = Curve(way.label, way.kind, tuple(sorted(measured, key=lambda point: point[0])))
        for units, compensation in panels:
            alike = way.compensation == compensation or way.kind == "dynamic"
            if way.units == units and alike:
                panels[units, compensation].append(curve)
    return {
        key: sorted(panel, key=lambda curve: (_ORDER.index(curve.kind), curve.points[-1][1].value))
        for key, panel in sorted(panels.items())
    }


def drawn_figure(results: Results) -> str:
    """What curves show."""
    return "KL to dense, nats" if results.on_answers else "perplexity over dense"


def write_curves(results: Results, path: Path) -> bool:
    """Draw the curves to a PNG; False where there is nothing to draw."""
    panels = curves(results)
    if not panels:
        return False
    units = sorted({key[0] for key in panels}, reverse=True)
    compensations = sorted({key[1] for key in panels})
    width = _WIDTH * len(units) + _LEGEND_WIDTH
    figure, grid = new_figure(len(compensations), len(units), width, _HEIGHT * len(compensations))
    styles = _styles(panels)
    handles: dict[str, Any] = {}
    for row, compensation in enumerate(compensations):
        for column, unit in enumerate(units):
            axes = grid[row][column]
            axes.set_title(f"{units_name(unit)}, compensation {compensation}")
            panel = panels.get((unit, compensation), [])
            for curve in panel:
                # Bands of a dozen controls hide each other; the table has these.
                band = curve.kind != "control"
                line = Line(curve.label, places(curve), band=band, **styles[curve.label])
                handles.setdefault(curve.label, draw_line(axes, line))
            axes.set_xticks(sorted({round(100 * x, 1) for curve in panel for x, _ in curve.points}))
            axes.set_xlabel("parameters of these units removed, %")
            axes.set_ylabel(drawn_figure(results))
            values = [y.value for curve in panel for _, y in curve.points]
            if results.on_answers:
                most = max(filter(math.isfinite, values), default=0) or 1
                axes.set_ylim(0, min(HIGHEST, 1.05 * most))
            else:
                ratio_axis(axes, values, HIGHEST)
    figure.suptitle(f"{results.header['model']['name']}: {results.judge}")
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    save_png(figure, path)
    return True


def places(curve: Curve) -> list[Point]:
    """The curve's points, by percent removed."""
    return [Point(100 * share, one.value, one.low, one.high) for share, one in curve.points]


def _styles(panels: dict[tuple[str, str], list[Curve]]) -> dict[str, dict[str, Any]]:
    """A colour per label, the same in every panel; shades of grey for controls."""
    kinds = {curve.label: curve.kind for panel in panels.values() for curve in panel}
    controls = [label for label, kind in kinds.items() if kind == "control"]
    methods = [label for label in kinds if label not in controls]
    markers = "osD^vP*X"
    styles: dict[str, dict[str, Any]] = {}
    for index, label in enumerate(methods):
        styles[label] = {
            "colour": f"C{index % 10}",
            "dash": _DASHED.get(kinds[label], "-"),
            "marker": markers[index // 10 % len(markers)],
        }
    for index, label in enumerate(controls):
        styles[label] = {
            "colour": str(0.15 + 0.55 * index / len(controls)),
            "dash": _DASHED["control"],
            "marker": markers[(len(methods) + index) % len(markers)],
            "width": 1.0,
        }
    return styles
