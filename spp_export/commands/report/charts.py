"""Charts of the page: drawn by matplotlib in the page's colours, with a name for every point."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from spp_export.commands.report.files import mapping, number, text
from spp_export.commands.report.page import plain, resource
from spp_export.commands.report.page.figures import TIMES, figure
from spp_export.common.errors import UsageError
from spp_export.common.plots import (
    Line,
    Point,
    context_axis,
    draw_line,
    new_figure,
    plot_style,
    ratio_axis,
)
from spp_export.evaluation.harness.curves import HIGHEST, Curve, curves, drawn_figure, places
from spp_export.evaluation.harness.records import RESULTS, Results, read_results
from spp_export.evaluation.harness.table import source_notes, units_name
from spp_export.models.shape import UNITS
from spp_export.planning import Plan

# main: what the page is about. bound: the most that is possible. other: one of a few to compare
# with. faint: one of many.
Style = Literal["main", "bound", "other", "faint"]
_STYLES: dict[Style, dict[str, Any]] = {
    "faint": {"width": 1.0, "size": 4.5, "band": False},
    "other": {"width": 1.6, "size": 5.5, "band": False},
    "bound": {"width": 1.6, "size": 5.5, "band": False, "dash": "--"},
    "main": {"width": 2.6, "size": 7.0},
}
_HUES = 6
# More bands would lie on each other, more others be hard to tell apart.
_MOST_BANDS, _COMPARED = 2, 4
# Narrow, so that letters stay legible where a telephone shrinks it; in units of 1/72 inch.
_WIDTH, _HEIGHT = 460, 300
_LETTERS = 12
_CURVES = "parameters of these units removed, %"


@dataclass(frozen=True)
class Series:
    """A line of a chart; series of one `hue` have one colour, and None is grey."""

    label: str
    points: Sequence[Point]
    style: Style = "main"
    hue: int | None = 0

    @property
    def ink(self) -> str:
        """The name of its colour in the page's style."""
        return "plain" if self.hue is None else f"hue{self.hue % _HUES}"


@dataclass(frozen=True)
class Chart:
    """Lines over an axis of contexts, or of shares removed, where `x_label` names it.

    y_label: stands above the chart. ratio: whether 1 is the dense model. highest: the y axis ends
    there at the latest. mark: a place on the x
    axis and its name. unit, x_unit: what follows a value. dashed: what the lines of style `bound`
    are, for the legend.
    """

    title: str
    y_label: str
    series: Sequence[Series]
    unit: str
    x_unit: str = " tokens"
    x_label: str = ""
    ratio: bool = True
    highest: float = math.inf
    mark: tuple[float, str] | None = None
    dashed: str = ""

    @property
    def named(self) -> list[Series]:
        """What the legend names."""
        return [series for series in self.series if series.style in ("main", "other")]

    @property
    def faint(self) -> int:
        """How many lines are named on hover alone."""
        return sum(series.style == "faint" for series in self.series)

    def svg(self, name: str) -> str:
        """The picture as an element of HTML; `name` is an id that no other chart has."""
        # What matters last, so that it lies on top.
        ordered = [line for style in _STYLES for line in self.series if line.style == style]
        label = f"{self.title}: {self.y_label} over {self.x_label or 'context, tokens'}."
        titles = {
            f"{name}-{index}": [
                self._title(series, p) for p in series.points if p.y <= self.highest
            ]
            for index, series in enumerate(ordered)
        }
        return _inline(self._figure(name, ordered), name, f"{label} Arrow keys move.", titles)

    def _figure(self, name: str, ordered: Sequence[Series]) -> Any:
        inks = _inks()
        drawn, grid = new_figure(1, 1, _WIDTH / 72, _HEIGHT / 72, **_rc(inks))
        axes = grid[0][0]
        bands = sum(series.style == "main" for series in ordered) <= _MOST_BANDS
        for index, series in enumerate(ordered):
            ink = inks[series.ink]
            style = {"band": bands} | _STYLES[series.style]
            style |= {"face": inks["page"]} if series.style == "bound" else {}
            style |= {"highest": self.highest, "group": f"{name}-{index}"}
            draw_line(axes, Line("", series.points, ink, **style))
        xs = sorted({point.x for series in ordered for point in series.points})
        if self.x_label:
            axes.set_xlabel(self.x_label)
            axes.set_xticks(xs)
            axes.xaxis.set_major_formatter("{x:.3g}")
        else:
            context_axis(axes, xs)
        if self.ratio:
            ratio_axis(axes, (p.y for series in ordered for p in series.points), self.highest)
        else:
            axes.set_ylim(bottom=0)
        if self.mark:
            at, word = self.mark
            axes.axvline(at, color=inks["soft"], linewidth=0.8, linestyle=":")
            style = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            left = 2 * at > xs[0] + xs[-1]
            offset, side = (-4, "right") if left else (4, "left")
            axes.annotate(word, (at, 1), (offset, -4), va="top", ha=side, **style)
        return drawn

    def _title(self, series: Series, point: Point) -> str:
        lines = [series.label, f"{point.x:g}{self.x_unit}: {figure(point.y, 4)}{self.unit}"]
        if point.low is not None and point.high is not None and point.low != point.high:
            lines.append(f"from {figure(point.low, 4)} to {figure(point.high, 4)}")
        return "\n".join(lines)


@cache
def _inks() -> dict[str, str]:
    """The page's light colours by name. In a picture they become variables of its style again, so
    that it is dark where the page is."""
    names = {"page", "soft", "grid", "plain", *(f"hue{index}" for index in range(_HUES))}
    light = resource("style.css").partition("@media")[0]
    colours = re.findall(r"--(\w+): (#[0-9a-f]{6});", light)
    return {name: colour for name, colour in colours if name in names}


def _rc(inks: Mapping[str, str]) -> dict[str, Any]:
    """matplotlib's settings for the page."""
    sides = dict.fromkeys(("left", "right", "top"), False)
    return {
        "font.size": _LETTERS,
        "axes.edgecolor": inks["soft"],
        "axes.grid.axis": "y",
        "grid.color": inks["grid"],
        "xtick.color": inks["soft"],
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    } | {f"axes.spines.{side}": shown for side, shown in sides.items()}


def _inline(drawn: Any, name: str, label: str, titles: Mapping[str, Sequence[str]]) -> str:
    """A figure as an <svg> within HTML: without styles of its own, which the page's policy forbids,
    and with the titles of its points, by the id of their group."""
    file = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with plot_style(**{"svg.fonttype": "none", "svg.hashsalt": name}):
        drawn.savefig(file, format="svg", metadata=metadata)
    root = ElementTree.fromstring(file.getvalue())
    variables = {colour: f"var(--{ink})" for ink, colour in _inks().items()}
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.items()}
        style = attributes.pop("style", "")
        pairs = (pair.split(": ", 1) for pair in style.split("; ") if pair)
        attributes |= {
            key: variables.get(value, value) for key, value in pairs if not key.startswith("font")
        }
        if element.tag == "g" and attributes.get("id") not in titles:
            attributes.pop("id", None)
        element.attrib.clear()
        element.attrib.update(attributes)
    for group in root.iter("g"):
        if "id" in group.attrib:
            _name_points(group, titles[group.attrib["id"]])
    root.attrib.clear()
    root.attrib |= {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "class": "marks lines"}
    root.attrib |= {"role": "grid", "aria-label": plain(label)}
    focused = root.find(".//use[@role='gridcell']")
    if focused is not None:
        focused.set("tabindex", "0")
    return ElementTree.tostring(root, encoding="unicode")


def _name_points(group: Any, titles: Sequence[str]) -> None:
    group.set("role", "row")
    for marker in group.iterfind("defs/path"):
        # Its outline is that of each point, which changes when it is pointed at.
        marker.attrib.pop("stroke", None)
    for point, title in zip(group.iter("use"), titles, strict=True):
        point.attrib |= {"role": "gridcell", "tabindex": "-1"}
        ElementTree.SubElement(point, "title").text = plain(title)


def quality_charts(path: Path, plan: Plan) -> tuple[list[Chart], list[Chart], str]:
    """Of an evaluation's results: charts of the plan's units and compensation, the other charts,
    and a remark.

    Raises UsageError for results of another model, OutputError for what holds none.
    """
    results = read_results(path / RESULTS if path.is_dir() else path)
    try:
        _check_model(path, results, plan)
        panels = curves(results)
        note = _note(results, plan)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UsageError(f"{path}: results of 'spp eval' that are malformed.") from None
    own = (_units(plan), plan.compensation)
    charts = {key: _curves_chart(key, panel, plan, results) for key, panel in panels.items()}
    first = [chart for key, chart in charts.items() if key == own]
    more = [chart for key, chart in charts.items() if key != own]
    # Without a panel of the plan's own kind, all of them are what there is.
    return (first, more, note) if first else (more, [], note)


def _check_model(path: Path, results: Results, plan: Plan) -> None:
    fingerprint = text(mapping(results.header.get("model")).get("fingerprint"))
    if fingerprint != plan.model_fingerprint:
        raise UsageError(
            f"{path}: evaluates the model {fingerprint[:16]}, this plan is for "
            f"{plan.model_fingerprint[:16]}. Give results for the same model."
        )


def _note(results: Results, plan: Plan) -> str:
    header = results.header
    scenario = mapping(header["scenario"])
    documents = header["texts"][results.judge]["documents"]
    sentences = [
        f"Curves: {drawn_figure(results)}, on {results.judge}, {documents} documents; the "
        "figures named on a point are its 95 % interval."
    ]
    if text(scenario.get("sha256")) != text(plan.scenario.get("sha256")):
        name = text(scenario.get("name"))
        sentences.append(f"The evaluation is for another scenario, {name}.")
    if cpu := text(mapping(header.get("machine")).get("cpu")):
        sentences.append(f"Measured on {cpu}.")
    sentences += source_notes(results)
    return " ".join(sentences)


def _units(plan: Plan) -> str:
    """What the plan's budget removes, as `spp eval` calls it."""
    units = mapping(plan.budget.get("asked")).get("units")
    if units in UNITS:
        return str(units)
    return "both" if any(layer.channels is not None for layer in plan.layers) else "heads"


def _curves_chart(
    key: tuple[str, str], panel: Sequence[Curve], plan: Plan, results: Results
) -> Chart:
    units, compensation = key
    criterion = text(plan.criterion.get("name"))
    methods = [c.label for c in panel if c.kind == "method" and c.label != criterion][:_COMPARED]
    series = []
    for curve in panel:
        points = [point for point in places(curve) if math.isfinite(point.y)]
        style: Style = "faint"
        hue = None
        if curve.label == criterion:
            style, hue = "main", 0
        elif curve.label in methods and curve.kind == "method":
            style, hue = "other", 1 + methods.index(curve.label)
        if points:
            series.append(Series(curve.label, points, style, hue))
    series.sort(key=lambda line: (line.hue is None, line.hue))
    kept = number(mapping(plan.budget.get("realised")).get("keep"))
    own = key == (_units(plan), plan.compensation)
    return Chart(
        f"{units_name(units).capitalize()}, compensation {compensation}",
        f"{drawn_figure(results)}, {results.judge}",
        series,
        " nats" if results.on_answers else f"{TIMES} dense",
        x_unit=" % removed",
        x_label=_CURVES,
        ratio=not results.on_answers,
        highest=math.inf if results.on_answers else HIGHEST,
        mark=(100 * (1 - kept), "this export") if own and kept and 0 < kept <= 1 else None,
    )
