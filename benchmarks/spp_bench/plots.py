"""Curves over context, as PNGs: speed-up with its bound drawn in, and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spp_bench.measure import PHASES
from spp_export.common.errors import OutputError
from spp_export.common.plots import (
    Line,
    Point,
    context_axis,
    draw_line,
    new_figure,
    ratio_axis,
    save_png,
)

_WIDTH, _HEIGHT = 5.5, 4.0


def write_plots(document: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write speedup.png and, where memory was measured, memory.png; return the files written.

    Raises OutputError where a file cannot be written.
    """
    figures = {"speedup.png": _speedups(document)}
    if document["memory"]:
        figures["memory.png"] = _memory(document)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save_png(figure, directory / name)
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written ({error.strerror}).") from error
    return [directory / name for name in figures]


def _panels(document: Mapping[str, Any], titles: Sequence[str]) -> tuple[Any, dict[Any, Any]]:
    """A figure of a row per batch size and a column per title; axes by (batch, title)."""
    batches = sorted({cell["batch"] for cell in document["cells"]})
    width, height = _WIDTH * len(titles), _HEIGHT * len(batches)
    figure, grid = new_figure(len(batches), len(titles), width, height)
    panels = {}
    for batch, row in zip(batches, grid, strict=True):
        for title, axes in zip(titles, row, strict=True):
            panels[batch, title] = axes
            axes.set_title(f"{title}, batch {batch}")
            context_axis(axes, (c["context"] for c in document["cells"] if c["batch"] == batch))
    figure.suptitle(document["model"]["name"])
    return figure, panels


def _speedups(document: Mapping[str, Any]) -> Any:
    """Measured speed-ups with their 20th and 80th percentiles (solid), and bounds (dashed)."""
    figure, panels = _panels(document, PHASES)
    slim = [c["name"] for c in document["candidates"] if c["baseline"]]
    for (batch, phase), axes in panels.items():
        axes.set_ylabel("speed-up over dense")
        values = []
        for index, name in enumerate(slim):
            measured = [
                (cell["context"], row[phase]["speedup"])
                for cell in document["cells"]
                for row in cell["rows"]
                if cell["batch"] == batch and row["name"] == name and phase in row
            ]
            if not measured:
                continue
            speeds = [Point(x, y["median"], y["p20"], y["p80"]) for x, y in measured]
            bounds = [Point(x, y["bound"]) for x, y in measured]
            colour = f"C{index % 10}"
            draw_line(axes, Line(name, speeds, colour))
            draw_line(axes, Line(f"{name}: bound", bounds, colour, dash="--", marker="_"))
            values += [point.y for point in speeds + bounds]
        ratio_axis(axes, values)
        axes.legend()
    return figure


def _memory(document: Mapping[str, Any]) -> Any:
    """Weights and cache (solid), and what the process held at its peak (dotted)."""
    figure, panels = _panels(document, ["memory"])
    for (batch, _), axes in panels.items():
        axes.set_ylabel("MB")
        for index, record in enumerate(document["memory"]):
            weights, before = record["weight_bytes"], record["before_bytes"]
            cells = [cell for cell in record["cells"] if cell["batch"] == batch]
            held = [Point(c["context"], (weights + c["kv_bytes"]) / 1e6) for c in cells]
            peaks = [Point(c["context"], (c["peak_bytes"] - before) / 1e6) for c in cells]
            name, colour = record["name"], f"C{index % 10}"
            draw_line(axes, Line(name, held, colour))
            draw_line(axes, Line(f"{name}: peak", peaks, colour, dash=":", marker="."))
        axes.legend()
        axes.set_ylim(bottom=0)
    return figure
