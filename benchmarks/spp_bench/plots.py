"""Curves over context, as PNGs: speed-up with its bound drawn in, and memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spp_bench.measure import PHASES
from spp_export.common.errors import OutputError, UsageError

_WIDTH, _HEIGHT = 5.5, 4.0


def check_plots() -> None:
    """UsageError where matplotlib, which an extra brings, is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "--plot: curves are drawn by matplotlib, which is not installed. "
            "Install it with: pip install 'spp-export[plots]'."
        ) from None


def write_plots(document: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write speedup.png and, where memory was measured, memory.png; the files written.

    Raises UsageError where matplotlib is missing, OutputError where the disk refuses.
    """
    check_plots()
    figures = {"speedup.png": _speedups(document)}
    if document["memory"]:
        figures["memory.png"] = _memory(document)
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            # Without the version of matplotlib, so that equal results give equal files.
            figure.savefig(directory / name, format="png", dpi=120, metadata={"Software": None})
            written.append(directory / name)
    except OSError as error:
        raise OutputError(f"{directory}: cannot be written ({error.strerror}).") from error
    return written


def _panels(document: Mapping[str, Any], columns: list[str]) -> tuple[Any, dict[Any, Any]]:
    """A figure of a row per batch size and a column per title; axes by (batch, title)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches = sorted({cell["batch"] for cell in document["cells"]})
    size = (_WIDTH * len(columns), _HEIGHT * len(batches))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(batches), len(columns), squeeze=False)
    axes = {}
    for row, batch in enumerate(batches):
        for column, title in enumerate(columns):
            each = axes[batch, title] = grid[row][column]
            each.set_title(f"{title}, batch {batch}")
            each.set_xlabel("context, tokens")
            each.set_xscale("log", base=2)
            each.xaxis.set_major_formatter("{x:g}")
            each.grid(alpha=0.25)
    figure.suptitle(document["model"]["name"])
    return figure, axes


def _speedups(document: Mapping[str, Any]) -> Any:
    """Measured speed-ups with their 20th and 80th percentiles, solid; bounds, dashed."""
    figure, axes = _panels(document, list(PHASES))
    slim = [c["name"] for c in document["candidates"] if c["baseline"]]
    for (batch, phase), each in axes.items():
        each.axhline(1.0, color="0.6", linewidth=0.8)
        each.set_ylabel("speed-up over dense")
        for index, name in enumerate(slim):
            found = [
                (cell["context"], row[phase]["speedup"])
                for cell in document["cells"]
                for row in cell["rows"]
                if cell["batch"] == batch and row["name"] == name and phase in row
            ]
            if not found:
                continue
            contexts = [context for context, _ in found]
            median, low, high, limit = (
                [over[key] for _, over in found] for key in ("median", "p20", "p80", "bound")
            )
            style = {"color": f"C{index % 10}"}
            each.plot(contexts, median, marker="o", markersize=4, label=name, **style)
            each.fill_between(contexts, low, high, alpha=0.15, linewidth=0, **style)
            each.plot(contexts, limit, linestyle="--", marker="_", label=f"{name}: bound", **style)
        each.legend(fontsize="small")
    return figure


def _memory(document: Mapping[str, Any]) -> Any:
    """Weights and cache, solid, and what the process held at its peak, dotted."""
    figure, axes = _panels(document, ["memory"])
    for (batch, _), each in axes.items():
        each.set_ylabel("MB")
        for index, record in enumerate(document["memory"]):
            cells = [cell for cell in record["cells"] if cell["batch"] == batch]
            contexts = [cell["context"] for cell in cells]
            held = [(record["weight_bytes"] + cell["kv_bytes"]) / 1e6 for cell in cells]
            peaks = [(cell["peak_bytes"] - record["before_bytes"]) / 1e6 for cell in cells]
            style = {"color": f"C{index % 10}"}
            label = record["name"]
            each.plot(contexts, held, marker="o", markersize=4, label=label, **style)
            each.plot(contexts, peaks, linestyle=":", marker=".", label=f"{label}: peak", **style)
        each.legend(fontsize="small")
        each.set_ylim(bottom=0)
    return figure
