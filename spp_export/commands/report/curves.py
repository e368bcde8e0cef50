"""An evaluation's results as curves of a report: perplexity over dense against what is removed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from spp_export.commands.report.files import mapping, number, text
from spp_export.commands.report.page import Chart, Point, Series, Style
from spp_export.commands.report.page.figures import TIMES
from spp_export.common.errors import UsageError
from spp_export.evaluation.harness.curves import Curve, curves
from spp_export.evaluation.harness.records import RESULTS, Results, read_results
from spp_export.evaluation.harness.table import units_name
from spp_export.planning import Plan

# Ruinous choices would press all others to the bottom.
_CUT = 6.0
_COMPARED = 4


def quality_charts(
    path: Path, plan: Plan
) -> tuple[tuple[Chart, ...], tuple[Chart, ...], tuple[str, ...]]:
    """Charts of the plan's units and compensation, the other charts, and remarks.

    Raises UsageError for results of another model, OutputError for what holds none.
    """
    results = read_results(path / RESULTS if path.is_dir() else path)
    try:
        _check_model(path, results, plan)
        panels = curves(results)
        notes = _notes(results, plan)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UsageError(f"{path}: results of 'spp eval' that are malformed.") from None
    units = _units(plan)
    first: list[Chart] = []
    more: list[Chart] = []
    for (unit, compensation), panel in panels.items():
        title = f"{units_name(unit).capitalize()}, compensation {compensation}"
        own = (unit, compensation) == (units, plan.compensation)
        chart = _chart(title, panel, plan, results.judge, own=own)
        (first if own else more).append(chart)
    # Without a panel of the plan's own kind, all of them are what there is.
    return (tuple(first), tuple(more), notes) if first else (tuple(more), (), notes)


def _check_model(path: Path, results: Results, plan: Plan) -> None:
    found = text(mapping(results.header.get("model")).get("fingerprint"))
    if found != plan.model_fingerprint:
        raise UsageError(
            f"{path}: evaluates the model {found[:16]}, this plan is for "
            f"{plan.model_fingerprint[:16]}. Give results for the same model."
        )


def _notes(results: Results, plan: Plan) -> tuple[str, ...]:
    header = results.header
    scenario = mapping(header["scenario"])
    documents = header["texts"][results.judge]["documents"]
    machine = mapping(header.get("machine"))
    sentences = [
        f"Curves: perplexity over the dense model's on {results.judge}, {documents} documents; the "
        "figures named on a point are its 95 % interval."
    ]
    if text(scenario.get("sha256")) != text(plan.scenario.get("sha256")):
        name = text(scenario.get("name"))
        sentences.append(f"The evaluation is for another scenario, {name}.")
    if cpu := text(machine.get("cpu")):
        sentences.append(f"Measured on {cpu}.")
    return (" ".join(sentences),)


def _units(plan: Plan) -> str:
    """What the plan's budget lets go, as `spp eval` calls it."""
    units = mapping(plan.budget.get("asked")).get("units")
    if units in ("heads", "channels", "both"):
        return str(units)
    return "both" if any(layer.channels is not None for layer in plan.layers) else "heads"


def _chart(title: str, panel: Sequence[Curve], plan: Plan, judge: str, *, own: bool) -> Chart:
    criterion = text(plan.criterion.get("name"))
    methods = [c for c in panel if c.kind == "method" and c.label != criterion][:_COMPARED]
    series = []
    for curve in panel:
        points = tuple(
            Point(100 * share, found.value, _finite(found.low), _finite(found.high))
            for share, found in curve.points
            if math.isfinite(found.value)
        )
        style: Style = "faint"
        hue = None
        if curve.label == criterion:
            style, hue = "main", 0
        elif curve in methods:
            style, hue = "other", 1 + methods.index(curve)
        if points:
            series.append(Series(curve.label, points, style, hue))
    series.sort(key=lambda one: (one.hue is None, one.hue))
    kept = number(mapping(plan.budget.get("realised")).get("keep")) if own else None
    return Chart(
        title,
        "parameters of these units removed, %",
        f"perplexity over dense, {judge}",
        tuple(series),
        level=1.0,
        mark=None if kept is None else (100 * (1 - kept), "this export"),
        cut=_CUT,
        unit=f"{TIMES} dense",
        x_unit=" % removed",
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
