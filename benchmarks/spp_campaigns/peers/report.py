"""The rows as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_TITLES = ("s", "s flushed", "peak MB", "file MB", "loads", "units", "max logit diff", "equal")


def report(document: Mapping[str, Any]) -> RenderableType:
    """Machine, then a table for every model and plan, and below it a line for what failed."""
    machine = " ".join(f"{name}: {value}" for name, value in document["machine"].items())
    parts: list[RenderableType] = [Text(machine, style="dim")]
    for model in document["models"]:
        parts.append(Text(_heading(model), style="bold"))
        for case in model["cases"]:
            parts += [Text(f"{case['plan']}  {_reference(case['reference'])}"), _table(case)]
            parts += [Text(note, style="red") for note in _notes(case)]
    return Group(*parts)


def _heading(model: Mapping[str, Any]) -> str:
    return (
        f"\n{model['model']}, {model['dtype']}, {model['source_bytes'] / 1e6:.0f} MB; cp "
        f"{model['cp_seconds']:.1f} s, cp and flush {model['cp_and_flush_seconds']:.1f} s"
    )


def _reference(reference: Mapping[str, Any]) -> str:
    if "largest_logit" not in reference:
        return f"(no reference: {reference.get('skipped') or reference.get('error')})"
    return (
        f"(largest logit {reference['largest_logit']:.3g}, moved by the plan by up to "
        f"{reference['moved_by_plan']:.3g})"
    )


def _table(case: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    for title in _TITLES:
        table.add_column(title, justify="right", no_wrap=True)
    for row in case["rows"]:
        table.add_row(row["name"], *_cells(row))
    return table


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    if "error" in row:
        yield "failed"
        return
    yield f"{row['seconds']:.2f}"
    yield f"{row['flushed_seconds']:.2f}"
    yield f"{row['peak_bytes'] / 1e6:.0f}"
    yield f"{row['file_bytes'] / 1e6:.1f}"
    if "load_error" in row:
        yield "no"
        return
    yield row["loads"]
    yield "as asked" if row["as_asked"] else "wrong"
    yield f"{row['difference']:.1e}" if "difference" in row else ""
    yield {True: "yes", False: "no", None: "?"}[row.get("equal")]


def _notes(case: Mapping[str, Any]) -> Iterator[str]:
    for row in case["rows"]:
        if "error" in row:
            yield f"{row['name']}: {row['error']}"
        elif "load_error" in row:
            yield f"{row['name']}: does not load: {row['load_error']}"
        elif not row["as_asked"]:
            yield (
                f"{row['name']}: {row['wrong_tensors']} of {row['tensors']} tensors are not what "
                f"was asked for: {row['first_wrong']}"
            )
        if "run_error" in row:
            yield f"{row['name']}: does not run: {row['run_error']}"
        if "skipped" in row:
            yield f"{row['name']}: logits not compared: {row['skipped']}"
